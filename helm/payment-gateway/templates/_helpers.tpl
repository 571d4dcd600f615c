{{/* Names, labels, and what follows from several values. */}}

{{- define "gateway.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- /* At most 47 characters, so that every suffix of the chart fits into a DNS label. */}}
{{- define "gateway.fullname" -}}
{{- $name := include "gateway.name" . }}
{{- $full := printf "%s-%s" .Release.Name $name }}
{{- if .Values.fullnameOverride }}
{{- $full = .Values.fullnameOverride }}
{{- else if contains $name .Release.Name }}
{{- $full = .Release.Name }}
{{- end }}
{{- $full | trunc 47 | regexFind "^.*[^-]" }}
{{- end }}

{{- define "gateway.labels" -}}
{{- include "gateway.labelsOf" (dict "root" .) }}
{{- end }}

{{- /* Of a component, and with more: (dict "root" $ "component" "gateway" "more" .Values.podLabels).
A label stands once, whoever gives it, and selectors hang on the chart's own. */}}
{{- define "gateway.labelsOf" -}}
{{- $own := dict
  "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-")
  "app.kubernetes.io/name" (include "gateway.name" .root)
  "app.kubernetes.io/instance" .root.Release.Name
  "app.kubernetes.io/version" .root.Chart.AppVersion
  "app.kubernetes.io/managed-by" .root.Release.Service }}
{{- with .component }}
{{- $_ := set $own "app.kubernetes.io/component" . }}
{{- end }}
{{- merge $own (default dict .more) (default dict .root.Values.commonLabels) | toYaml }}
{{- end }}

{{- /* Of a component: (dict "root" $ "component" "gateway"). Never change them: a Deployment's
selector cannot. */}}
{{- define "gateway.selector" -}}
app.kubernetes.io/name: {{ include "gateway.name" .root | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component | quote }}
{{- end }}

{{- define "gateway.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .fallback }}
{{- end }}
{{- end }}

{{- define "gateway.gatewayImage" -}}
{{ include "gateway.image" (dict "image" .Values.image "fallback" .Chart.AppVersion) }}
{{- end }}

{{- define "gateway.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "gateway.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "gateway.migrationsServiceAccountName" -}}
{{- if .Values.migrations.serviceAccount.create }}
{{- default (printf "%s-migrations" (include "gateway.fullname" .)) .Values.migrations.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.migrations.serviceAccount.name }}
{{- end }}
{{- end }}

{{- /* "true" or empty, as every question here. */}}
{{- define "gateway.tls" -}}
{{- if kindIs "bool" .Values.tls.enabled }}
{{- if .Values.tls.enabled }}true{{ end }}
{{- else if not .Values.embedded }}true
{{- end }}
{{- end }}

{{- define "gateway.native" -}}
{{- if eq .Values.transport "native" }}true{{ end }}
{{- end }}

{{- define "gateway.mutualTLS" -}}
{{- if and (include "gateway.tls" .) (or .Values.tls.clientCa.existingSecret .Values.tls.clientCa.certificate) }}true{{ end }}
{{- end }}

{{- /* Kubernetes' gRPC probes speak plain text to the pod's address: where there is TLS, or a
server on loopback behind Envoy, the probes are HTTP's. */}}
{{- define "gateway.grpcProbes" -}}
{{- if not (or (include "gateway.tls" .) (include "gateway.native" .)) }}true{{ end }}
{{- end }}

{{- define "gateway.scaled" -}}
{{- if or .Values.autoscaling.enabled .Values.keda.enabled }}true{{ end }}
{{- end }}

{{- /* The least number of pods. */}}
{{- define "gateway.podsMin" -}}
{{- if .Values.embedded }}1
{{- else if .Values.autoscaling.enabled }}{{ .Values.autoscaling.minReplicas | int }}
{{- else if .Values.keda.enabled }}{{ .Values.keda.minReplicas | int }}
{{- else }}{{ .Values.replicaCount | int }}
{{- end }}
{{- end }}

{{- /* The greatest. */}}
{{- define "gateway.podsMax" -}}
{{- if .Values.autoscaling.enabled }}{{ .Values.autoscaling.maxReplicas | int }}
{{- else if .Values.keda.enabled }}{{ .Values.keda.maxReplicas | int }}
{{- else }}{{ include "gateway.podsMin" . }}
{{- end }}
{{- end }}

{{- define "gateway.postgresSecret" -}}
{{- default (printf "%s-servers" (include "gateway.fullname" .)) .Values.postgres.existingSecret }}
{{- end }}

{{- define "gateway.redisSecret" -}}
{{- default (printf "%s-servers" (include "gateway.fullname" .)) .Values.redis.existingSecret }}
{{- end }}

{{- define "gateway.tlsSecret" -}}
{{- default (printf "%s-tls" (include "gateway.fullname" .)) .Values.tls.existingSecret }}
{{- end }}

{{- define "gateway.clientCaSecret" -}}
{{- default (printf "%s-client-ca" (include "gateway.fullname" .)) .Values.tls.clientCa.existingSecret }}
{{- end }}

{{- /* The key of the DSN or address: its own where the Secret is yours. */}}
{{- define "gateway.postgresKey" -}}
{{- ternary .Values.postgres.existingSecretKey "postgres-dsn" (ne .Values.postgres.existingSecret "") }}
{{- end }}

{{- define "gateway.redisKey" -}}
{{- ternary .Values.redis.existingSecretKey "redis-url" (ne .Values.redis.existingSecret "") }}
{{- end }}

{{- define "gateway.clientCaKey" -}}
{{- ternary .Values.tls.clientCa.existingSecretKey "ca.crt" (ne .Values.tls.clientCa.existingSecret "") }}
{{- end }}

{{- /* The least termination grace: the pause before SIGTERM, a drain's two graces (for calls, and
for what they left), 10 s to flush and 10 s for workers to end. gateway/workers.py counts alike. */}}
{{- define "gateway.graceMin" -}}
{{- $pause := .Values.preStopSeconds | int }}
{{- if include "gateway.native" . }}{{- $pause = max $pause (.Values.envoy.drainSeconds | int) }}{{- end }}
{{- add $pause (mulf 2 .Values.settings.drain_grace_s | ceil | int) 20 }}
{{- end }}

{{- define "gateway.grace" -}}
{{- if kindIs "invalid" .Values.terminationGracePeriodSeconds }}
{{- include "gateway.graceMin" . }}
{{- else }}
{{- .Values.terminationGracePeriodSeconds | int }}
{{- end }}
{{- end }}

{{- /* A setting's value as a variable has it. Not by toString, which turns 2097152 into
2.097152e+06. */}}
{{- define "gateway.plain" -}}
{{- if kindIs "string" . }}{{ . }}{{ else }}{{ toJson . }}{{ end }}
{{- end }}

{{- /* Every variable that is no secret, as YAML. */}}
{{- define "gateway.variables" -}}
{{- $variables := dict
  "GATEWAY_ENVIRONMENT" (ternary "development" "production" .Values.embedded)
  "GATEWAY_TRANSPORT" .Values.transport
  "GATEWAY_LISTEN_ADDRESS" (ternary "127.0.0.1:50052" (printf "%s:50051" .Values.listenHost) (eq .Values.transport "native"))
  "GATEWAY_METRICS_ADDRESS" (printf "%s:9464" .Values.listenHost) }}
{{- if .Values.notifications.enabled }}
{{- $_ := set $variables "GATEWAY_NOTIFICATIONS_ADDRESS" (printf "%s:9465" .Values.listenHost) }}
{{- end }}
{{- if include "gateway.native" . }}
{{- $_ := set $variables "GATEWAY_TRUSTED_FRONT" "true" }}
{{- else }}
{{- $_ := set $variables "GATEWAY_CONNECTION_AGE_MAX_S" (include "gateway.plain" .Values.connectionAgeSeconds) }}
{{- if include "gateway.tls" . }}
{{- $_ := set $variables "GATEWAY_TLS_CERTIFICATE_FILE" "/tls/tls.crt" }}
{{- $_ := set $variables "GATEWAY_TLS_KEY_FILE" "/tls/tls.key" }}
{{- end }}
{{- if include "gateway.mutualTLS" . }}
{{- $_ := set $variables "GATEWAY_TLS_CLIENT_CA_FILE" "/client-ca/ca.crt" }}
{{- end }}
{{- end }}
{{- if .Values.embedded }}
{{- $_ := set $variables "GATEWAY_EMBEDDED_DIR" "/data/embedded" }}
{{- end }}
{{- if .Values.simulator.enabled }}
{{- $_ := set $variables "GATEWAY_SIMULATOR_URL" (printf "http://%s-simulator:9400" (include "gateway.fullname" .)) }}
{{- $_ := set $variables "GATEWAY_SIMULATOR_PROFILE" .Values.simulator.profile }}
{{- end }}
{{- range $name, $value := .Values.settings }}
{{- if not (kindIs "invalid" $value) }}
{{- $_ := set $variables (printf "GATEWAY_%s" (upper $name)) (include "gateway.plain" $value) }}
{{- end }}
{{- end }}
{{- toYaml $variables }}
{{- end }}

{{- /* The pods' security context, service account and image secrets, alike everywhere. */}}
{{- define "gateway.podBasics" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Which nodes every pod of the release may run on. */}}
{{- define "gateway.placement" -}}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Of `affinity` what is about nodes: the rest is about the gateway's pods. */}}
{{- define "gateway.nodeAffinity" -}}
{{- with (.Values.affinity | default dict).nodeAffinity }}
nodeAffinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "gateway.image.fields" -}}
image: {{ include "gateway.gatewayImage" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
{{- end }}

{{- /* The hooks' own objects: made before each phase, taken away after it. Those of the release
do not exist yet when the first phase runs. */}}
{{- define "gateway.hookOwn" -}}
helm.sh/hook: pre-install,pre-upgrade,post-install,post-upgrade
helm.sh/hook-weight: "-10"
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{- /* Where certificates are mounted. */}}
{{- define "gateway.tlsMounts" -}}
{{- if include "gateway.tls" . }}
- {name: tls, mountPath: /tls, readOnly: true}
{{- end }}
{{- if include "gateway.mutualTLS" . }}
- {name: client-ca, mountPath: /client-ca, readOnly: true}
{{- end }}
{{- end }}

{{- /* The rule that lets a pod ask for names, in a NetworkPolicy. */}}
{{- define "gateway.dnsEgress" -}}
- ports: # DNS
    {{- range .Values.networkPolicy.egress.dnsPorts }}
    - {port: {{ . | int }}, protocol: UDP}
    - {port: {{ . | int }}, protocol: TCP}
    {{- end }}
{{- end }}

{{- /* The IP families of a Service. */}}
{{- define "gateway.ipFamilies" -}}
{{- with .Values.service.ipFamilyPolicy }}
ipFamilyPolicy: {{ . }}
{{- end }}
{{- with .Values.service.ipFamilies }}
ipFamilies:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
