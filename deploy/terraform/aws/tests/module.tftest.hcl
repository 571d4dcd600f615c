# What must hold of every plan, with providers that make nothing up but ids: no account is needed.

mock_provider "aws" {
  # AWS' own form, which the real provider insists on.
  mock_resource "aws_kms_key" {
    defaults = {
      arn    = "arn:aws:kms:eu-central-1:123456789012:key/00000000-0000-0000-0000-000000000000"
      key_id = "00000000-0000-0000-0000-000000000000"
    }
  }

  mock_resource "aws_iam_role" {
    defaults = {
      arn = "arn:aws:iam::123456789012:role/role"
    }
  }

  mock_resource "aws_sns_topic" {
    defaults = {
      arn = "arn:aws:sns:eu-central-1:123456789012:alarms"
    }
  }

  mock_resource "aws_secretsmanager_secret" {
    defaults = {
      arn = "arn:aws:secretsmanager:eu-central-1:123456789012:secret:servers"
      id  = "arn:aws:secretsmanager:eu-central-1:123456789012:secret:servers"
    }
  }

  mock_resource "aws_db_instance" {
    defaults = {
      endpoint = "db.example.com:5432"
    }
  }

  mock_resource "aws_elasticache_replication_group" {
    defaults = {
      id                       = "payments"
      primary_endpoint_address = "cache.example.com"
    }
  }

  mock_data "aws_iam_policy_document" {
    defaults = {
      json = "{\"Version\":\"2012-10-17\",\"Statement\":[]}"
    }
  }

  mock_data "aws_partition" {
    defaults = {
      partition = "aws"
    }
  }

  mock_data "aws_caller_identity" {
    defaults = {
      account_id = "123456789012"
    }
  }
}

mock_provider "random" {
  mock_resource "random_password" {
    defaults = {
      result = "secret"
    }
  }
}

variables {
  vpc_id     = "vpc-1"
  subnet_ids = ["subnet-1", "subnet-2", "subnet-3"]
}

run "what_was_acknowledged_survives_a_zone" {
  assert {
    condition     = aws_db_instance.this.multi_az
    error_message = "PostgreSQL has no synchronous standby."
  }

  assert {
    condition = contains([
      for each in aws_db_parameter_group.this.parameter : "${each.name}=${each.value}"
    ], "synchronous_commit=on")
    error_message = "The gateway refuses a server with synchronous_commit off."
  }

  assert {
    condition     = aws_db_instance.this.backup_retention_period >= 1 && aws_db_instance.this.deletion_protection
    error_message = "PostgreSQL can be lost by a mistake."
  }

  assert {
    condition     = !aws_db_instance.this.skip_final_snapshot && aws_db_instance.this.final_snapshot_identifier != null
    error_message = "Nothing is left of a PostgreSQL that is deleted."
  }

  assert {
    condition = (
      aws_elasticache_replication_group.this.automatic_failover_enabled
      && aws_elasticache_replication_group.this.multi_az_enabled
      && aws_elasticache_replication_group.this.num_cache_clusters == 2
    )
    error_message = "Redis has no replica to go on with."
  }
}

run "redis_keeps_what_has_no_end_yet" {
  assert {
    condition = contains([
      for each in aws_elasticache_parameter_group.this.parameter : "${each.name}=${each.value}"
    ], "maxmemory-policy=noeviction")
    error_message = "Redis evicts the counts of the networks' reattempt limits when it is full."
  }

  assert {
    condition = (
      aws_elasticache_replication_group.this.parameter_group_name == aws_elasticache_parameter_group.this.name
      && aws_elasticache_parameter_group.this.family == "valkey8"
    )
    error_message = "Redis does not use the module's parameters, or they are another version's."
  }
}

run "data_are_encrypted_at_rest_and_on_the_way" {
  assert {
    condition     = aws_db_instance.this.storage_encrypted && aws_db_instance.this.kms_key_id == aws_kms_key.this.arn
    error_message = "PostgreSQL is not encrypted with the module's key."
  }

  assert {
    condition = contains([
      for each in aws_db_parameter_group.this.parameter : "${each.name}=${each.value}"
    ], "rds.force_ssl=1")
    error_message = "PostgreSQL takes plain text."
  }

  assert {
    condition = (
      aws_elasticache_replication_group.this.transit_encryption_enabled
      && aws_elasticache_replication_group.this.at_rest_encryption_enabled
      && aws_elasticache_replication_group.this.auth_token != null
    )
    error_message = "Redis takes plain text, or anybody."
  }

  assert {
    condition     = aws_eks_cluster.this.encryption_config[0].resources == toset(["secrets"])
    error_message = "The cluster's Secrets are not encrypted with the module's key."
  }
}

run "nobody_outside_reaches_data_or_the_api" {
  assert {
    condition     = !aws_db_instance.this.publicly_accessible
    error_message = "PostgreSQL is public."
  }

  assert {
    condition     = aws_eks_cluster.this.vpc_config[0].endpoint_private_access && !aws_eks_cluster.this.vpc_config[0].endpoint_public_access
    error_message = "The Kubernetes API is public without being asked to."
  }

  assert {
    condition = alltrue([
      for rule in [aws_vpc_security_group_ingress_rule.postgres, aws_vpc_security_group_ingress_rule.redis] :
      rule.cidr_ipv4 == null && rule.referenced_security_group_id == aws_eks_cluster.this.vpc_config[0].cluster_security_group_id
    ])
    error_message = "Others than the cluster's pods reach the servers."
  }
}

run "the_secret_holds_both_addresses_with_verified_tls" {
  assert {
    condition     = jsondecode(aws_secretsmanager_secret_version.servers.secret_string).dsn == "postgresql://payments:secret@db.example.com:5432/payments?sslmode=verify-full&sslrootcert=/postgres-ca/global-bundle.pem"
    error_message = "The DSN is not what the gateway takes."
  }

  assert {
    condition     = jsondecode(aws_secretsmanager_secret_version.servers.secret_string).url == "rediss://:secret@cache.example.com:6379/0"
    error_message = "Redis' address is not what the gateway takes."
  }
}

run "every_alarm_goes_somewhere_and_says_what_it_means" {
  variables {
    alarm_actions = ["arn:aws:sns:eu-central-1:123456789012:pager"]
  }

  assert {
    condition = alltrue([
      for alarm in concat(values(aws_cloudwatch_metric_alarm.postgres), values(aws_cloudwatch_metric_alarm.redis)) :
      length(alarm.alarm_actions) == 2 && alarm.treat_missing_data == "breaching" && length(alarm.alarm_description) > 20
    ])
    error_message = "An alarm reaches nobody, or is silent when its server is."
  }

  assert {
    condition = toset([
      for alarm in values(aws_cloudwatch_metric_alarm.redis) : alarm.dimensions.CacheClusterId
    ]) == toset(["payments-001", "payments-002"])
    error_message = "A node of Redis is not watched."
  }

  assert {
    condition     = aws_cloudwatch_metric_alarm.postgres["storage"].threshold == 200 * 1024 * 1024 * 1024 * 0.15
    error_message = "The alarm on storage does not follow its size."
  }
}

run "a_standby_in_the_same_zone_is_refused" {
  command = plan

  variables {
    subnet_ids = ["subnet-1", "subnet-1"]
  }

  expect_failures = [var.subnet_ids]
}

run "the_whole_internet_is_refused_at_the_api" {
  command = plan

  variables {
    api_public_cidrs = ["203.0.113.0/24", "0.0.0.0/0"]
  }

  expect_failures = [var.api_public_cidrs]
}

run "too_few_nodes_no_backups_and_old_clusters_are_refused" {
  command = plan

  variables {
    nodes                = { min = 1, desired = 1, max = 1 }
    postgres_backup_days = 0
    kubernetes_version   = "1.29"
    name                 = "Payments"
  }

  expect_failures = [var.nodes, var.postgres_backup_days, var.kubernetes_version, var.name]
}

run "an_office_may_reach_the_api" {
  variables {
    api_public_cidrs    = ["203.0.113.0/24"]
    deletion_protection = false
  }

  assert {
    condition     = aws_eks_cluster.this.vpc_config[0].public_access_cidrs == toset(["203.0.113.0/24"])
    error_message = "The API is reached by others than was asked for."
  }

  assert {
    condition     = aws_db_instance.this.skip_final_snapshot
    error_message = "A try-out cannot be taken away again."
  }
}
