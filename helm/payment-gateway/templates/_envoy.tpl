{{- /* What `native` leaves to its proxy: TLS, bounds, the age of connections, leading clients away. */}}
{{- define "gateway.envoy" -}}
{{- $settings := .Values.settings -}}
{{- $message := 2097152 }}{{- if hasKey $settings "message_bytes_max" }}{{- $message = $settings.message_bytes_max | int }}{{- end }}
{{- $metadata := 16384 }}{{- if hasKey $settings "metadata_bytes_max" }}{{- $metadata = $settings.metadata_bytes_max | int }}{{- end }}
{{- $streams := 1000 }}{{- if hasKey $settings "concurrent_streams_max" }}{{- $streams = $settings.concurrent_streams_max | int }}{{- end }}
{{- $ping := 60 }}{{- if hasKey $settings "keepalive_time_s" }}{{- $ping = $settings.keepalive_time_s }}{{- end }}
{{- $silence := 20 }}{{- if hasKey $settings "keepalive_timeout_s" }}{{- $silence = $settings.keepalive_timeout_s }}{{- end }}
{{- $route := "{cluster: gateway, timeout: 0s, max_stream_duration: {grpc_timeout_header_max: 0s}}" -}}
# Without a name it takes no secrets from files.
node: {id: gateway, cluster: gateway}
# On loopback: only containers of this pod reach it.
admin:
  address: {socket_address: {address: 127.0.0.1, port_value: 9901}}
# What callers can make it hold is bounded: connections by number, buffers by the container's memory.
overload_manager:
  refresh_interval: 0.25s
  resource_monitors:
    - name: envoy.resource_monitors.cgroup_memory
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.resource_monitors.cgroup_memory.v3.CgroupMemoryConfig
    - name: envoy.resource_monitors.global_downstream_max_connections
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig
        max_active_downstream_connections: {{ .Values.envoy.connectionsMax | int }}
  actions:
    - name: envoy.overload_actions.stop_accepting_requests
      triggers: [{name: envoy.resource_monitors.cgroup_memory, threshold: {value: 0.9}}]
    - name: envoy.overload_actions.stop_accepting_connections
      triggers: [{name: envoy.resource_monitors.cgroup_memory, threshold: {value: 0.95}}]
static_resources:
  listeners:
    - name: grpc
      address: {socket_address: {address: {{ .Values.listenHost | trimAll "[]" | quote }}, port_value: 50051, ipv4_compat: {{ contains ":" .Values.listenHost }}}}
      per_connection_buffer_limit_bytes: 1048576
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: grpc
                codec_type: HTTP2
                use_remote_address: true
                # What a client says of its certificate is thrown away; with mutual TLS the header is
                # written anew from the handshake, for GATEWAY_CLIENT_IDENTITY=forwarded.
                {{- if include "gateway.mutualTLS" . }}
                forward_client_cert_details: SANITIZE_SET
                set_current_client_cert_details: {uri: true}
                {{- else }}
                forward_client_cert_details: SANITIZE
                {{- end }}
                generate_request_id: false
                max_request_headers_kb: {{ div (add $metadata 1023) 1024 }}
                stream_idle_timeout: 0s
                request_headers_timeout: 10s
                drain_timeout: 5s
                common_http_protocol_options:
                  idle_timeout: 3600s
                  headers_with_underscores_action: REJECT_REQUEST
                  {{- if .Values.connectionAgeSeconds }}
                  max_connection_duration: {{ include "gateway.plain" .Values.connectionAgeSeconds }}s
                  {{- end }}
                http2_protocol_options:
                  max_concurrent_streams: {{ $streams }}
                  initial_stream_window_size: 65536
                  initial_connection_window_size: 1048576
                  connection_keepalive: {interval: {{ include "gateway.plain" $ping }}s, timeout: {{ include "gateway.plain" $silence }}s}
                route_config:
                  name: grpc
                  virtual_hosts:
                    - name: gateway
                      domains: ["*"]
                      routes:
                        # Streams are not buffered; each of their messages is measured by the gateway.
                        {{- range list "/payments.v1.PaymentService/StreamAuthorizePayments" "/grpc.health.v1.Health/Watch" "/grpc.reflection." }}
                        - match: {prefix: {{ . }}}
                          route: {{ $route }}
                          typed_per_filter_config:
                            envoy.filters.http.buffer:
                              "@type": type.googleapis.com/envoy.extensions.filters.http.buffer.v3.BufferPerRoute
                              disabled: true
                        {{- end }}
                        - match: {prefix: /}
                          route: {{ $route }}
                http_filters:
                  # The gateway itself refuses what is above its limit, with a reason; this bounds
                  # what it has to take in for that.
                  - name: envoy.filters.http.buffer
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer
                      max_request_bytes: {{ mul 2 $message }}
                  - name: envoy.filters.http.router
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
          {{- if include "gateway.tls" . }}
          transport_socket:
            name: envoy.transport_sockets.tls
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
              {{- if include "gateway.mutualTLS" . }}
              require_client_certificate: true
              {{- end }}
              common_tls_context:
                alpn_protocols: [h2]
                tls_params: {tls_minimum_protocol_version: TLSv1_2}
                # By files of their own, since Envoy watches only those: a renewed certificate, and
                # an authority that was replaced, are read when the Secret changes.
                tls_certificate_sds_secret_configs:
                  - name: server
                    sds_config: {path_config_source: {path: /etc/envoy/server.yaml}, resource_api_version: V3}
                {{- if include "gateway.mutualTLS" . }}
                validation_context_sds_secret_config:
                  name: clients
                  sds_config: {path_config_source: {path: /etc/envoy/clients.yaml}, resource_api_version: V3}
                {{- end }}
          {{- end }}
  clusters:
    - name: gateway
      type: STATIC
      connect_timeout: 1s
      # One client's resets may end its own connection to the gateway, never another client's calls.
      connection_pool_per_downstream_connection: true
      circuit_breakers:
        thresholds:
          # The gateway refuses overload itself, with a reason and a pause.
          - {max_requests: 1000000, max_pending_requests: 1000000, max_connections: 1000000}
      typed_extension_protocol_options:
        envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
          "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
          # Envoy keeps them when their client has gone, for an hour if this is not said.
          common_http_protocol_options: {idle_timeout: 30s}
          explicit_http_config:
            http2_protocol_options:
              max_concurrent_streams: {{ $streams }}
      load_assignment:
        cluster_name: gateway
        endpoints:
          - lb_endpoints:
              - endpoint:
                  address: {socket_address: {address: 127.0.0.1, port_value: 50052}}
{{- end }}

{{- define "gateway.envoy.server" -}}
resources:
  - "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret
    name: server
    tls_certificate:
      certificate_chain: {filename: /tls/tls.crt}
      private_key: {filename: /tls/tls.key}
      watched_directory: {path: /tls}
{{- end }}

{{- define "gateway.envoy.clients" -}}
resources:
  - "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret
    name: clients
    validation_context:
      trusted_ca: {filename: /client-ca/ca.crt}
      watched_directory: {path: /client-ca}
{{- end }}
