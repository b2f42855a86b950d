{{/* Whether an endpoint picker says which server a request goes to; empty if not. */}}
{{- define "synthia.picks" -}}
{{- if ne .Values.gateway.kind "none" }}yes{{ end }}
{{- end }}

{{/* The Service that takes requests from outside. */}}
{{- define "synthia.front" -}}
{{ include "synthia.fullname" . }}{{ if eq .Values.gateway.kind "standalone" }}-gateway{{ end }}
{{- end }}

{{/* The name that requests call the model by. */}}
{{- define "synthia.servedName" -}}
{{- $base := eq .Values.model.name "demo" | ternary "synthia-demo" (base (include "synthia.model" .)) -}}
{{ .Values.settings.served_name | default $base }}
{{- end }}

{{/* What each server tells of its prefix cache: the picker subscribes to `kv@`, and knows the server
by its address and the model by what comes last. */}}
{{- define "synthia.kvEvents" -}}
enable_kv_cache_events: true
publisher: zmq
endpoint: tcp://*:5557
replay_endpoint: tcp://*:5558
topic: kv@{{ include "synthia.fullname" . }}@{{ include "synthia.servedName" . }}
{{- end }}

{{/* An image, by the picker's or the gateway's value. */}}
{{- define "synthia.imageOf" -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag }}{{ end }}
{{- end }}

{{/* (list $ "picker"): what the pods of picker and gateway have. They stand on different nodes. */}}
{{- define "synthia.fleetPod" -}}
{{- $root := index . 0 -}}
enableServiceLinks: false
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
securityContext:
  {{- include "synthia.podSecurity" $root | nindent 2 }}
{{- with $root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
topologySpreadConstraints:
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "synthia.selectorLabels" $ | nindent 8 }}
{{- end }}
{{- end }}

{{/* Pods in other namespaces that may come in, beside all of this one. */}}
{{- define "synthia.callers" -}}
- podSelector: {}
{{- with .Values.networkPolicy.from }}
{{ toYaml . }}
{{- end }}
{{- end }}
