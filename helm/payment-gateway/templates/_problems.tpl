{{/* What values.schema.json cannot say clearly: values that are right alone and wrong together. All
problems are told at once. */}}

{{- define "gateway.check" -}}
{{- $problems := list }}
{{- if .Values.embedded }}
  {{- if or .Values.postgres.dsn .Values.postgres.existingSecret .Values.redis.url .Values.redis.existingSecret }}
  {{- $problems = append $problems "embedded: brings its own PostgreSQL and Redis; leave postgres.* and redis.* empty, or set embedded to false" }}
  {{- end }}
  {{- if include "gateway.scaled" . }}
  {{- $problems = append $problems "embedded: is one pod; disable autoscaling and keda" }}
  {{- end }}
  {{- if .Values.simulator.enabled }}
  {{- $problems = append $problems "embedded: runs a simulator of its own; set simulator.enabled to false" }}
  {{- end }}
{{- else }}
  {{- range $name, $inline := dict "postgres" "dsn" "redis" "url" }}
  {{- $server := index $.Values $name }}
  {{- $given := index $server $inline }}
  {{- if and $given $server.existingSecret }}
  {{- $problems = append $problems (printf "%s: set existingSecret or %s, not both" $name $inline) }}
  {{- else if not (or $given $server.existingSecret) }}
  {{- $problems = append $problems (printf "%s: set %s.existingSecret to a Secret that holds the address (or %s.%s). To try the chart out without servers, set embedded to true" $name $name $name $inline) }}
  {{- end }}
  {{- end }}
{{- end }}
{{- $tls := .Values.tls }}
{{- if include "gateway.tls" . }}
  {{- $sources := 0 }}
  {{- if $tls.existingSecret }}{{ $sources = add1 $sources }}{{ end }}
  {{- if or $tls.certificate $tls.key }}{{ $sources = add1 $sources }}{{ end }}
  {{- if $tls.certManager.enabled }}{{ $sources = add1 $sources }}{{ end }}
  {{- if eq (int $sources) 0 }}
  {{- $problems = append $problems "tls: set tls.existingSecret, tls.certificate and tls.key, or tls.certManager; or set tls.enabled to false, for plain text inside a mesh that encrypts" }}
  {{- else if gt (int $sources) 1 }}
  {{- $problems = append $problems "tls: set one of existingSecret, certificate with key, and certManager, not several" }}
  {{- end }}
  {{- if ne (empty $tls.certificate) (empty $tls.key) }}
  {{- $problems = append $problems "tls: certificate and key belong together" }}
  {{- end }}
  {{- if and $tls.clientCa.existingSecret $tls.clientCa.certificate }}
  {{- $problems = append $problems "tls.clientCa: set existingSecret or certificate, not both" }}
  {{- end }}
{{- else }}
  {{- if or $tls.existingSecret $tls.certificate $tls.key $tls.certManager.enabled $tls.clientCa.existingSecret $tls.clientCa.certificate }}
  {{- $problems = append $problems "tls: certificates are set, but TLS is off; set tls.enabled to true" }}
  {{- end }}
  {{- if .Values.grpcRoute.backendTLS.enabled }}
  {{- $problems = append $problems "grpcRoute.backendTLS: the pods serve without TLS" }}
  {{- end }}
{{- end }}
{{- if and .Values.autoscaling.enabled .Values.keda.enabled }}
{{- $problems = append $problems "autoscaling and keda: enable one, not both; KEDA makes an autoscaler of its own" }}
{{- end }}
{{- range $name := list "autoscaling" "keda" }}
{{- $scaler := index $.Values $name }}
{{- if gt (int $scaler.minReplicas) (int $scaler.maxReplicas) }}
{{- $problems = append $problems (printf "%s: minReplicas must not be greater than maxReplicas" $name) }}
{{- end }}
{{- end }}
{{- if .Values.keda.enabled }}
  {{- if and .Values.keda.inFlight.enabled (not .Values.keda.inFlight.serverAddress) }}
  {{- $problems = append $problems "keda.inFlight: needs serverAddress, Prometheus' address" }}
  {{- end }}
  {{- if not (or .Values.keda.targetCPUUtilizationPercentage .Values.keda.inFlight.enabled .Values.keda.triggers) }}
  {{- $problems = append $problems "keda: has nothing to scale on; set targetCPUUtilizationPercentage, inFlight or triggers" }}
  {{- end }}
{{- end }}
{{- if lt (include "gateway.grace" . | int) (include "gateway.graceMin" . | int) }}
{{- $problems = append $problems (printf "terminationGracePeriodSeconds: %s would kill a pod that drains; at least %s with these drain settings, or null" (include "gateway.grace" .) (include "gateway.graceMin" .)) }}
{{- end }}
{{- if and .Values.simulator.enabled (or (hasKey .Values.settings "simulator_url") (hasKey .Values.settings "simulator_profile") (hasKey .Values.secretSettings "simulator_url") (hasKey .Values.secretSettings "simulator_profile")) }}
{{- $problems = append $problems "simulator: its address and profile follow from simulator.*; take simulator_url and simulator_profile out of the settings" }}
{{- end }}
{{- if and .Values.simulator.enabled .Values.simulator.notifications.existingSecret (not .Values.notifications.enabled) }}
{{- $problems = append $problems "simulator.notifications: the gateway takes none; set notifications.enabled" }}
{{- end }}
{{- range $name, $_ := .Values.secretSettings }}
{{- if hasKey $.Values.settings $name }}
{{- $problems = append $problems (printf "secretSettings.%s: is in settings, too" $name) }}
{{- end }}
{{- end }}
{{- /* What the migrations, Envoy or this file must know too. */}}
{{- range $name := list "client_identity" "concurrent_streams_max" "keepalive_time_s" "keepalive_timeout_s" "message_bytes_max" "metadata_bytes_max" "postgres_row_security" }}
{{- if hasKey $.Values.secretSettings $name }}
{{- $problems = append $problems (printf "secretSettings.%s: other parts of the chart follow from it; set it in settings" $name) }}
{{- end }}
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}
{{- $problems = append $problems "ingress: needs hosts" }}
{{- end }}
{{- if and .Values.grpcRoute.enabled (not .Values.grpcRoute.parentRefs) }}
{{- $problems = append $problems "grpcRoute: needs parentRefs" }}
{{- end }}
{{- if .Values.grpcRoute.backendTLS.enabled }}
  {{- if not .Values.grpcRoute.enabled }}
  {{- $problems = append $problems "grpcRoute.backendTLS: needs grpcRoute.enabled" }}
  {{- end }}
  {{- if not .Values.grpcRoute.backendTLS.hostname }}
  {{- $problems = append $problems "grpcRoute.backendTLS: needs hostname" }}
  {{- end }}
{{- end }}
{{- if and .Values.tls.certManager.enabled (not .Values.tls.certManager.issuerRef.name) }}
{{- $problems = append $problems "tls.certManager: needs issuerRef.name" }}
{{- end }}
{{- if and .Values.migrations.postgres.existingSecret .Values.embedded }}
{{- $problems = append $problems "migrations.postgres: embedded migrates its own database" }}
{{- end }}
{{- if and .Values.settings.postgres_row_security .Values.migrations.enabled .Values.migrations.postgres.existingSecret (not .Values.migrations.login) }}
{{- $problems = append $problems "migrations.login: with settings.postgres_row_security and an owner of its own in migrations.postgres, name the user of postgres.*, to whom the roles are granted" }}
{{- end }}
{{- $account := include "gateway.serviceAccountName" . }}
{{- if and .Values.migrations.enabled (not .Values.embedded) (or .Values.serviceAccount.create .Values.migrations.serviceAccount.create) (eq $account (include "gateway.migrationsServiceAccountName" .)) }}
{{- $problems = append $problems (printf "migrations.serviceAccount.name: %s is the gateway's own; the migrations' is made before it and deleted when they end" $account) }}
{{- end }}
{{- if and .Values.migrations.login (not .Values.settings.postgres_row_security) }}
{{- $problems = append $problems "migrations.login: is for settings.postgres_row_security" }}
{{- end }}
{{- if and (eq .Values.service.ipFamilyPolicy "SingleStack") (gt (len .Values.service.ipFamilies) 1) }}
{{- $problems = append $problems "service: SingleStack has one of ipFamilies" }}
{{- end }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" (include "gateway.fullname" .)) }}
{{- $problems = append $problems (printf "%s: cannot be a Service's name, which begins with a letter and has no dots; set fullnameOverride" (include "gateway.fullname" .)) }}
{{- end }}
{{- with .Values.updateStrategy.rollingUpdate }}
{{- if and (eq $.Values.updateStrategy.type "RollingUpdate") (has (toString .maxSurge) (list "0" "0%")) (has (toString .maxUnavailable) (list "0" "0%")) }}
{{- $problems = append $problems "updateStrategy.rollingUpdate: with maxSurge and maxUnavailable 0 no pod could ever be replaced" }}
{{- end }}
{{- end }}
{{- $identity := .Values.settings.client_identity | default "none" }}
{{- if ne $identity "none" }}
{{- $needed := ternary "forwarded" "certificate" (eq .Values.transport "native") }}
{{- if ne $identity $needed }}
{{- $problems = append $problems (printf "settings.client_identity: with transport %s it is %s" .Values.transport $needed) }}
{{- end }}
{{- if not (include "gateway.mutualTLS" .) }}
{{- $problems = append $problems "settings.client_identity: needs tls.clientCa, by which clients prove who they are" }}
{{- end }}
{{- end }}
{{- if $problems }}
{{- fail (printf "\n\nThe values cannot be used:\n- %s\n" (join "\n- " $problems)) }}
{{- end }}
{{- end }}
