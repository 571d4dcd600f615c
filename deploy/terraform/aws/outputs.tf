output "cluster_name" {
  description = "The EKS cluster, for `aws eks update-kubeconfig --name`."
  value       = aws_eks_cluster.this.name
}

output "servers_secret_arn" {
  description = "The secret with the keys dsn and url, for an ExternalSecret."
  value       = aws_secretsmanager_secret.servers.arn
}

output "postgres_endpoint" {
  description = "Where PostgreSQL is, as host:port."
  value       = aws_db_instance.this.endpoint
}

output "redis_endpoint" {
  description = "Where Redis' primary is."
  value       = aws_elasticache_replication_group.this.primary_endpoint_address
}

output "alarms_topic_arn" {
  description = "The topic that alarms go to; subscribe to it."
  value       = aws_sns_topic.alarms.arn
}
