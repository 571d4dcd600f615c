variable "name" {
  description = "What everything is named after."
  type        = string
  default     = "payments"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,18}[a-z0-9]$", var.name))
    error_message = "2 to 20 small letters, digits and hyphens, beginning with a letter, so that AWS' limits hold with every suffix."
  }
}

variable "vpc_id" {
  description = "The VPC to run in."
  type        = string
}

variable "subnet_ids" {
  description = "Private subnets in at least two zones: of pods, PostgreSQL and Redis."
  type        = list(string)

  validation {
    condition     = length(distinct(var.subnet_ids)) >= 2
    error_message = "At least two subnets: a standby in the same zone is none."
  }
}

variable "kubernetes_version" {
  description = "The minor version of EKS; the chart needs 1.30 or newer."
  type        = string
  default     = "1.34"

  validation {
    condition     = can(regex("^1\\.(3[0-9]|[4-9][0-9])$", var.kubernetes_version))
    error_message = "1.30 or newer."
  }
}

variable "api_public_cidrs" {
  description = "Who reaches the Kubernetes API over the internet; empty: nobody, only the VPC does."
  type        = list(string)
  default     = []

  validation {
    condition     = !contains(var.api_public_cidrs, "0.0.0.0/0")
    error_message = "Not the whole internet."
  }
}

variable "node_instance_types" {
  description = "The instances of the nodes."
  type        = list(string)
  default     = ["m7i.large"]
}

variable "nodes" {
  description = "How many nodes; a rollout needs room for one more pod than run."
  type = object({
    min     = number
    desired = number
    max     = number
  })
  default = { min = 2, desired = 3, max = 6 }

  validation {
    condition     = 2 <= var.nodes.min && var.nodes.min <= var.nodes.desired && var.nodes.desired <= var.nodes.max
    error_message = "2 <= min <= desired <= max."
  }
}

variable "postgres_version" {
  description = "PostgreSQL's version; RDS applies minor ones by itself where only the major is given."
  type        = string
  default     = "17"
}

variable "postgres_instance_class" {
  description = "The instance of PostgreSQL, and of its standby."
  type        = string
  default     = "db.m7g.large"
}

variable "postgres_storage_gb" {
  description = "PostgreSQL's storage at first; it grows to four times that by itself."
  type        = number
  default     = 200

  validation {
    condition     = var.postgres_storage_gb >= 20 && var.postgres_storage_gb <= 16384
    error_message = "20 to 16,384 GB."
  }
}

variable "postgres_backup_days" {
  description = "For how many days any moment can be restored."
  type        = number
  default     = 14

  validation {
    condition     = var.postgres_backup_days >= 1 && var.postgres_backup_days <= 35
    error_message = "1 to 35: without backups there is no restore at all."
  }
}

variable "postgres_ca_path" {
  description = "Where pods have the RDS certificate bundle (the chart's extraVolumes), for sslmode=verify-full."
  type        = string
  default     = "/postgres-ca/global-bundle.pem"
}

variable "redis_node_type" {
  description = "The instances of Redis (ElastiCache for Valkey)."
  type        = string
  default     = "cache.m7g.large"
}

variable "redis_version" {
  description = "Valkey's version."
  type        = string
  default     = "8.0"
}

variable "deletion_protection" {
  description = "Whether PostgreSQL can be deleted only after this is set to false, and leaves a last snapshot."
  type        = bool
  default     = true
}

variable "secrets_namespace" {
  description = "The namespace of what reads the secret for the cluster (External Secrets Operator)."
  type        = string
  default     = "external-secrets"
}

variable "secrets_service_account" {
  description = "Its service account, which alone may read the secret."
  type        = string
  default     = "external-secrets"
}

variable "alarm_actions" {
  description = "ARNs that alarms go to, beside the module's own SNS topic."
  type        = list(string)
  default     = []
}

variable "tags" {
  description = "Tags of everything."
  type        = map(string)
  default     = {}
}
