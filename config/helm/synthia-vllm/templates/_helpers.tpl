{{/* The name that rules, dashboard and autoscalers know the servers by (the job in Prometheus). */}}
{{- define "synthia.name" -}}
synthia-vllm
{{- end }}

{{/* What objects are called: the release, and the chart unless the release says so already. */}}
{{- define "synthia.fullname" -}}
{{- $both := printf "%s-%s" .Release.Name .Chart.Name -}}
{{- contains .Chart.Name .Release.Name | ternary .Release.Name $both | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* (list $ "server"): by which pods of one component are selected, and nothing foreign. */}}
{{- define "synthia.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "synthia.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* (list $ "server"): those, and what people want to know of an object. */}}
{{- define "synthia.labels" -}}
{{- $root := index . 0 -}}
{{ include "synthia.selectorLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* (list $ "server" "-cache"): name with that at its end, namespace (for `helm template`), labels. */}}
{{- define "synthia.metadata" -}}
{{- $root := index . 0 -}}
name: {{ include "synthia.fullname" $root }}{{ index . 2 }}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- include "synthia.labels" . | nindent 2 }}
{{- end }}

{{/* A pod's securityContext, as the level `restricted` of Pod Security asks for it. */}}
{{- define "synthia.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
{{- with .Values.supplementalGroups }}
supplementalGroups: {{ toJson . }}
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* A container's; the argument: whether its root file system is read-only. */}}
{{- define "synthia.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: {{ . }}
capabilities:
  drop: [ALL]
{{- end }}

{{/* The server's image; a digest goes before a tag. */}}
{{- define "synthia.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end -}}
{{- end }}

{{/* Seconds that a request may take; what is in front of the server must not give up before. */}}
{{- define "synthia.requestSeconds" -}}
{{ int .Values.settings.limits.request_seconds }}
{{- end }}
