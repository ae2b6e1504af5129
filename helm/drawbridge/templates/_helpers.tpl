{{/* Names of all objects begin so. 50 characters leave room for what follows: a name has at most 63. */}}
{{- define "drawbridge.fullname" -}}
{{- $name := ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) (contains .Chart.Name .Release.Name) }}
{{- default $name .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{/* Never change: a Deployment's selector is immutable. */}}
{{- define "drawbridge.release" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* The replicas alone: Jobs have another component. */}}
{{- define "drawbridge.replicas" -}}
{{ include "drawbridge.release" . }}
app.kubernetes.io/component: server
{{- end }}

{{- define "drawbridge.labels" -}}
{{ include "drawbridge.release" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* How long a replica may take from SIGTERM to its end. The 40 s are the bookings after the grace (src/server.rs). */}}
{{- define "drawbridge.drainTime" -}}
{{ add .Values.drain.delaySeconds .Values.drain.graceSeconds 40 }}
{{- end }}

{{/* What all pods have in common: the restricted profile, and where they run. */}}
{{- define "drawbridge.pod" -}}
automountServiceAccountToken: false
# A Service called drawbridge would otherwise put DRAWBRIDGE_PORT and the like into the environment.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  seccompProfile:
    type: RuntimeDefault
  {{- range $key, $value := .Values.podSecurityContext }}
  {{ $key }}: {{ int64 $value }}
  {{- end }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: master-keys
    secret:
      secretName: {{ .Values.masterKeys.existingSecret }}
      defaultMode: 0440
      items:
        - {key: {{ .Values.masterKeys.key }}, path: keys}
  {{- with .Values.ca.existingConfigMap }}
  - name: ca
    configMap:
      name: {{ . }}
      items:
        - {key: {{ $.Values.ca.key }}, path: ca.crt}
  {{- end }}
  {{- with .Values.extraVolumes }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}

{{/* What all containers have in common. Jobs get the replicas' settings too: a wrong one fails there, before a replica is touched.
     The environment comes last: the doctor adds to it. */}}
{{- define "drawbridge.container" -}}
image: {{ .Values.image.repository }}{{ with .Values.image.digest }}@{{ . }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
volumeMounts:
  - name: master-keys
    mountPath: /etc/drawbridge/master-keys
    readOnly: true
  {{- if .Values.ca.existingConfigMap }}
  - name: ca
    mountPath: /etc/drawbridge/ca
    readOnly: true
  {{- end }}
  {{- with .Values.extraVolumeMounts }}{{ toYaml . | nindent 2 }}{{ end }}
env:
  {{- $any := ternary "[::]" "0.0.0.0" (eq .Values.ipFamily "IPv6") }}
  - name: POD_IP
    valueFrom: {fieldRef: {fieldPath: status.podIP}}
  - name: DRAWBRIDGE_REPLICA_NAME
    valueFrom: {fieldRef: {fieldPath: metadata.name}}
  - name: DRAWBRIDGE_LISTEN
    value: {{ printf "%s:2455" $any | quote }}
  # The pod's own address, which is also what other replicas are told.
  - name: DRAWBRIDGE_INTERNAL_LISTEN
    value: {{ ternary "[$(POD_IP)]:2456" "$(POD_IP):2456" (eq .Values.ipFamily "IPv6") | quote }}
  - name: DRAWBRIDGE_ADMIN_LISTEN
    value: {{ printf "%s:9464" $any | quote }}
  - name: DRAWBRIDGE_DATABASE_URL
    valueFrom: {secretKeyRef: {name: {{ .Values.database.existingSecret }}, key: {{ .Values.database.urlKey }}}}
  {{- with .Values.database.directUrlKey }}
  - name: DRAWBRIDGE_DATABASE_DIRECT_URL
    valueFrom: {secretKeyRef: {name: {{ $.Values.database.existingSecret }}, key: {{ . }}}}
  {{- end }}
  {{- with .Values.redis.existingSecret }}
  - name: DRAWBRIDGE_REDIS_URL
    valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.redis.urlKey }}}}
  {{- end }}
  {{- with .Values.operatorToken.existingSecret }}
  - name: DRAWBRIDGE_OPERATOR_TOKEN
    valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.operatorToken.key }}}}
  {{- end }}
  - name: DRAWBRIDGE_MASTER_KEYS_FILE
    value: /etc/drawbridge/master-keys/keys
  {{- if .Values.ca.existingConfigMap }}
  - name: DRAWBRIDGE_CA_FILE
    value: /etc/drawbridge/ca/ca.crt
  {{- end }}
  # Must be told where there is no home directory; nothing is written with a database elsewhere.
  - name: DRAWBRIDGE_DATA_DIR
    value: /var/lib/drawbridge
  - name: DRAWBRIDGE_MIGRATE_ON_START
    value: {{ eq .Values.migration.mode "start" | quote }}
  - name: DRAWBRIDGE_DRAIN_DELAY
    value: {{ int64 .Values.drain.delaySeconds }}s
  - name: DRAWBRIDGE_DRAIN_GRACE
    value: {{ int64 .Values.drain.graceSeconds }}s
  {{- /* 0, false and empty are the program's defaults wherever they are allowed. */}}
  {{- range $name, $value := .Values.settings }}
  {{- with $value }}
  - name: DRAWBRIDGE_{{ snakecase $name | upper }}
    {{- if kindIs "map" . }}
    {{- $pairs := list }}
    {{- range $key, $of := . }}{{ $pairs = append $pairs (printf "%s=%v" $key $of) }}{{ end }}
    value: {{ join "," $pairs | quote }}
    {{- else }}
    value: {{ ternary (int64 .) . (kindIs "float64" .) | quote }}
    {{- end }}
  {{- end }}
  {{- end }}
  {{- with .Values.proxy.https }}
  - name: HTTPS_PROXY
    value: {{ . | quote }}
  {{- end }}
  {{- with .Values.proxy.noProxy }}
  - name: NO_PROXY
    value: {{ . | quote }}
  {{- end }}
  {{- with .Values.extraEnv }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}

{{/* Where all pods may go. */}}
{{- define "drawbridge.egress" -}}
- ports: # DNS
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
- ports: # Postgres, upstream
    {{- range concat .Values.networkPolicy.postgresPorts .Values.networkPolicy.upstreamPorts | uniq }}
    - port: {{ int64 . }}
    {{- end }}
    {{- if .Values.redis.existingSecret }}
    - port: {{ int64 .Values.networkPolicy.redisPort }} # Redis
    {{- end }}
- to: # each other
    - podSelector:
        matchLabels: {{- include "drawbridge.release" . | nindent 10 }}
{{- with .Values.networkPolicy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end }}
