# PostgreSQL with a synchronous standby in another zone: what was acknowledged survives a zone.

resource "aws_db_subnet_group" "this" {
  name       = var.name
  subnet_ids = var.subnet_ids
  tags       = local.tags
}

resource "aws_db_parameter_group" "this" {
  name_prefix = "${var.name}-"
  family      = "postgres${split(".", var.postgres_version)[0]}"
  description = "The gateway's: it refuses a server that may lose what it committed"
  tags        = local.tags

  parameter {
    name  = "rds.force_ssl"
    value = "1"
  }

  parameter {
    name  = "synchronous_commit"
    value = "on"
  }

  # A statement that nobody waits for must not hold locks.
  parameter {
    name  = "idle_in_transaction_session_timeout"
    value = "60000"
  }

  # Updates stay HOT and tables small only while vacuum keeps up.
  parameter {
    name  = "autovacuum_vacuum_scale_factor"
    value = "0.02"
  }

  lifecycle {
    create_before_destroy = true
  }
}

resource "random_password" "postgres" {
  length  = 48
  special = false # it stands in a URL
}

resource "random_id" "snapshot" {
  byte_length = 4
}

resource "aws_db_instance" "this" {
  identifier     = var.name
  engine         = "postgres"
  engine_version = var.postgres_version
  instance_class = var.postgres_instance_class
  db_name        = "payments"
  username       = "payments"
  password       = random_password.postgres.result
  port           = local.postgres_port
  tags           = local.tags

  # The standby is written synchronously: RPO 0 within the region.
  multi_az               = true
  db_subnet_group_name   = aws_db_subnet_group.this.name
  vpc_security_group_ids = [aws_security_group.postgres.id]
  publicly_accessible    = false
  parameter_group_name   = aws_db_parameter_group.this.name

  storage_type          = "gp3"
  allocated_storage     = var.postgres_storage_gb
  max_allocated_storage = 4 * var.postgres_storage_gb
  storage_encrypted     = true
  kms_key_id            = aws_kms_key.this.arn

  backup_retention_period = var.postgres_backup_days
  copy_tags_to_snapshot   = true
  deletion_protection     = var.deletion_protection
  # A name of its own, or the last snapshot of a second life would fail.
  skip_final_snapshot       = !var.deletion_protection
  final_snapshot_identifier = var.deletion_protection ? "${var.name}-last-${random_id.snapshot.hex}" : null

  auto_minor_version_upgrade      = true
  performance_insights_enabled    = true
  performance_insights_kms_key_id = aws_kms_key.this.arn
  enabled_cloudwatch_logs_exports = ["postgresql", "upgrade"]

  lifecycle {
    ignore_changes = [engine_version] # minor versions come by themselves
  }
}
