# Redis is the fast path and nothing more: it may lose everything, and no payment is doubled.

resource "aws_elasticache_subnet_group" "this" {
  name       = var.name
  subnet_ids = var.subnet_ids
  tags       = local.tags
}

resource "aws_elasticache_parameter_group" "this" {
  # It has no name_prefix: another major version needs another name before the old one goes.
  name        = "${var.name}-valkey${split(".", var.redis_version)[0]}"
  family      = "valkey${split(".", var.redis_version)[0]}"
  description = "Nothing is evicted: counts of the networks' limits would go first, they rest longest"
  tags        = local.tags

  parameter {
    name  = "maxmemory-policy"
    value = "noeviction"
  }

  lifecycle {
    create_before_destroy = true
  }
}

resource "random_password" "redis" {
  length  = 64
  special = false # it stands in a URL
}

resource "aws_elasticache_replication_group" "this" {
  replication_group_id = var.name
  description          = "Idempotency claims of ${var.name}"
  engine               = "valkey"
  engine_version       = var.redis_version
  node_type            = var.redis_node_type
  port                 = local.redis_port
  tags                 = local.tags

  num_cache_clusters         = 2
  automatic_failover_enabled = true
  multi_az_enabled           = true
  subnet_group_name          = aws_elasticache_subnet_group.this.name
  parameter_group_name       = aws_elasticache_parameter_group.this.name
  security_group_ids         = [aws_security_group.redis.id]

  transit_encryption_enabled = true
  auth_token                 = random_password.redis.result
  at_rest_encryption_enabled = true
  kms_key_id                 = aws_kms_key.this.arn

  # Nothing in it is worth a backup.
  snapshot_retention_limit   = 0
  auto_minor_version_upgrade = true
  apply_immediately          = false
}
