# What only AWS sees. The gateway's own alerts are the chart's (prometheusRule).

resource "aws_sns_topic" "alarms" {
  name_prefix       = "${var.name}-alarms-"
  kms_master_key_id = aws_kms_key.this.id
  tags              = local.tags
}

locals {
  gib = 1024 * 1024 * 1024

  postgres = { DBInstanceIdentifier = aws_db_instance.this.identifier }
  # ElastiCache names the nodes so; either may be the primary.
  redis = {
    for number in ["001", "002"] :
    number => { CacheClusterId = "${aws_elasticache_replication_group.this.id}-${number}" }
  }

  postgres_alarms = {
    cpu = {
      metric  = "CPUUtilization", statistic = "Average", above = true, threshold = 80, minutes = 10
      meaning = "PostgreSQL's CPU is above 80 %: batches wait, and a failover's catching up would not hold."
    }
    storage = {
      metric    = "FreeStorageSpace", statistic = "Minimum", above = false
      threshold = var.postgres_storage_gb * local.gib * 0.15, minutes = 5
      meaning   = "Less than 15 % of the first storage is free. A full disk refuses every payment."
    }
    memory = {
      metric  = "FreeableMemory", statistic = "Minimum", above = false, threshold = 0.5 * local.gib, minutes = 15
      meaning = "Less than 512 MiB of memory is free."
    }
    connections = {
      metric  = "DatabaseConnections", statistic = "Maximum", above = true, threshold = 800, minutes = 5
      meaning = "Many connections: each worker of each pod holds as many as `gateway doctor` says."
    }
    write_latency = {
      metric  = "WriteLatency", statistic = "Average", above = true, threshold = 0.01, minutes = 10
      meaning = "A write takes more than 10 ms: every answer waits for two commits."
    }
    wraparound = {
      metric  = "MaximumUsedTransactionIDs", statistic = "Maximum", above = true, threshold = 1000000000, minutes = 60
      meaning = "A billion transaction ids without a freeze: vacuum does not get through, and PostgreSQL will stop taking writes."
    }
  }

  redis_alarms = {
    cpu = {
      metric  = "EngineCPUUtilization", statistic = "Average", above = true, threshold = 80, minutes = 10
      meaning = "Redis' one thread is busy: claims wait."
    }
    memory = {
      metric  = "DatabaseMemoryUsagePercentage", statistic = "Maximum", above = true, threshold = 80, minutes = 10
      meaning = "Redis is nearly full. It loses no payment, but repeats will be answered by PostgreSQL."
    }
  }
}

resource "aws_cloudwatch_metric_alarm" "postgres" {
  for_each = local.postgres_alarms

  alarm_name          = "${var.name}-postgres-${replace(each.key, "_", "-")}"
  alarm_description   = each.value.meaning
  namespace           = "AWS/RDS"
  metric_name         = each.value.metric
  dimensions          = local.postgres
  statistic           = each.value.statistic
  comparison_operator = each.value.above ? "GreaterThanThreshold" : "LessThanThreshold"
  threshold           = each.value.threshold
  period              = 60
  evaluation_periods  = each.value.minutes
  # A database that says nothing is not well.
  treat_missing_data = "breaching"
  alarm_actions      = concat([aws_sns_topic.alarms.arn], var.alarm_actions)
  ok_actions         = concat([aws_sns_topic.alarms.arn], var.alarm_actions)
  tags               = local.tags
}

resource "aws_cloudwatch_metric_alarm" "redis" {
  for_each = {
    for pair in setproduct(keys(local.redis_alarms), keys(local.redis)) :
    "${pair[0]}-${pair[1]}" => merge(local.redis_alarms[pair[0]], { dimensions = local.redis[pair[1]] })
  }

  alarm_name          = "${var.name}-redis-${each.key}"
  alarm_description   = each.value.meaning
  namespace           = "AWS/ElastiCache"
  metric_name         = each.value.metric
  dimensions          = each.value.dimensions
  statistic           = each.value.statistic
  comparison_operator = each.value.above ? "GreaterThanThreshold" : "LessThanThreshold"
  threshold           = each.value.threshold
  period              = 60
  evaluation_periods  = each.value.minutes
  treat_missing_data  = "breaching"
  alarm_actions       = concat([aws_sns_topic.alarms.arn], var.alarm_actions)
  ok_actions          = concat([aws_sns_topic.alarms.arn], var.alarm_actions)
  tags                = local.tags
}
