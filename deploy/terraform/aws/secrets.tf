# The addresses with their passwords, as the chart wants them: one secret with the keys dsn and url.

resource "aws_secretsmanager_secret" "servers" {
  name_prefix             = "${var.name}-servers-"
  description             = "Addresses of PostgreSQL (dsn) and Redis (url) of ${var.name}"
  kms_key_id              = aws_kms_key.this.arn
  recovery_window_in_days = 30
  tags                    = local.tags
}

resource "aws_secretsmanager_secret_version" "servers" {
  secret_id = aws_secretsmanager_secret.servers.id
  secret_string = jsonencode({
    dsn = format(
      "postgresql://%s:%s@%s/%s?sslmode=verify-full&sslrootcert=%s",
      aws_db_instance.this.username,
      random_password.postgres.result,
      aws_db_instance.this.endpoint,
      aws_db_instance.this.db_name,
      var.postgres_ca_path,
    )
    url = format(
      "rediss://:%s@%s:%d/0",
      random_password.redis.result,
      aws_elasticache_replication_group.this.primary_endpoint_address,
      local.redis_port,
    )
  })
}

# Who reads it for the cluster, by EKS Pod Identity: one service account, this one secret.
data "aws_iam_policy_document" "secrets_trust" {
  statement {
    actions = ["sts:AssumeRole", "sts:TagSession"]

    principals {
      type        = "Service"
      identifiers = ["pods.eks.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "secrets" {
  statement {
    actions   = ["secretsmanager:GetSecretValue", "secretsmanager:DescribeSecret"]
    resources = [aws_secretsmanager_secret.servers.arn]
  }

  statement {
    actions   = ["kms:Decrypt"]
    resources = [aws_kms_key.this.arn]
  }
}

resource "aws_iam_role" "secrets" {
  name_prefix        = "${var.name}-secrets-"
  assume_role_policy = data.aws_iam_policy_document.secrets_trust.json
  tags               = local.tags
}

resource "aws_iam_role_policy" "secrets" {
  name_prefix = "read-"
  role        = aws_iam_role.secrets.id
  policy      = data.aws_iam_policy_document.secrets.json
}

resource "aws_eks_pod_identity_association" "secrets" {
  cluster_name    = aws_eks_cluster.this.name
  namespace       = var.secrets_namespace
  service_account = var.secrets_service_account
  role_arn        = aws_iam_role.secrets.arn
  tags            = local.tags
}
