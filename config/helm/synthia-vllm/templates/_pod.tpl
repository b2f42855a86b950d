{{/* The directory of the weights, or `demo`. */}}
{{- define "synthia.model" -}}
{{- with .Values.model -}}
{{- if eq .name "demo" }}demo
{{- else if .path }}/models/{{ .path }}
{{- else }}/models/{{ .revision }}/{{ .name }}
{{- end }}
{{- end }}
{{- end }}

{{/* Whether servers may be more than one; empty if not. */}}
{{- define "synthia.several" -}}
{{- if or (gt (int .Values.replicas) 1) (ne .Values.autoscaling.by "none") }}yes{{ end }}
{{- end }}

{{/* Whether there are volumes that outlive a pod; empty if not. */}}
{{- define "synthia.claims" -}}
{{- if or (ne .Values.model.name "demo") .Values.storage.data.enabled }}yes{{ end }}
{{- end }}

{{/* Options of the engine, as YAML: the values', and what the number of GPUs makes of them. */}}
{{- define "synthia.engine" -}}
{{- $gpus := mul .Values.nodes (max 1 .Values.gpus) | int -}}
{{- $own := dict -}}
{{- if gt $gpus 1 }}{{ $own = dict "tensor_parallel_size" $gpus }}{{ end -}}
{{- if include "synthia.picks" . }}{{ $_ := set $own "kv_events_config" (include "synthia.kvEvents" . | fromYaml) }}{{ end -}}
{{- toYaml (mergeOverwrite $own (deepCopy (.Values.settings.engine | default dict))) }}
{{- end }}

{{/* The server's configuration file. */}}
{{- define "synthia.settings" -}}
{{- $grace := .Values.drain.graceSeconds -}}
{{- $own := dict
  "host" "0.0.0.0"
  "model" (include "synthia.model" .)
  "engine" (include "synthia.engine" . | fromYaml)
  "shutdown_delay_seconds" .Values.drain.delaySeconds
  "shutdown_grace_seconds" (kindIs "invalid" $grace | ternary .Values.settings.limits.request_seconds $grace)
-}}
{{- if .Values.keys.secret }}{{ $_ := set $own "keys_file" "/etc/synthia/keys/keys.yaml" }}{{ end -}}
{{- if and (include "synthia.several" .) (not .Values.ledger.secret) }}{{ $_ := set $own "ledger" "none" }}{{ end -}}
{{- toYaml (mergeOverwrite (deepCopy .Values.settings) $own) }}
{{- end }}

{{/* What the kubelet waits for: both times of a drain, and the engine's end. */}}
{{- define "synthia.terminationSeconds" -}}
{{- with include "synthia.settings" . | fromYaml -}}
{{ add .shutdown_delay_seconds (ceil .shutdown_grace_seconds) 15 }}
{{- end }}
{{- end }}

{{/* What every pod has. */}}
{{- define "synthia.anyPod" -}}
serviceAccountName: {{ include "synthia.fullname" . }}
automountServiceAccountToken: false
# Else a Service by the name of `vllm` or `synthia` puts VLLM_PORT or SYNTHIA_PORT here, as URLs.
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
securityContext:
  {{- include "synthia.podSecurity" . | nindent 2 }}
{{- end }}

{{/* What every pod with a part of the model has. */}}
{{- define "synthia.gpuPod" -}}
{{ include "synthia.anyPod" . }}
terminationGracePeriodSeconds: {{ include "synthia.terminationSeconds" . }}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{ toJson . }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- if ne .Values.model.name "demo" }}
initContainers:
  - name: wait-for-weights
    image: {{ include "synthia.image" . }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    command:
      - sh
      - -c
      - |
        if ! [ -w /cache ]; then
          echo "$(id) cannot write to the volume of /cache. Its storage class leaves the owner to you:" \
            "docs/kubernetes.md#storage"
          exit 1
        fi
        {{- if not .Values.model.path }}
        until [ -e "$MODEL/.complete" ]; do
          echo "waiting for the job {{ include "synthia.fullname" . }}-download-... to fill $MODEL"
          sleep 10
        done
        {{- end }}
    env:
      - name: MODEL
        value: {{ include "synthia.model" . }}
    resources:
      requests: {cpu: 10m, memory: 32Mi}
      limits: {memory: 64Mi}
    securityContext:
      {{- include "synthia.containerSecurity" .Values.readOnlyRootFilesystem | nindent 6 }}
    volumeMounts:
      - {name: models, mountPath: /models, readOnly: true}
      - {name: cache, mountPath: /cache}
{{- end }}
{{- end }}

{{/* Of a container with a part of the model. */}}
{{- define "synthia.resources" -}}
{{- $gpus := dict -}}
{{- if .Values.gpus }}{{ $gpus = dict "nvidia.com/gpu" (.Values.gpus | toString) }}{{ end -}}
{{- $both := dict "requests" $gpus "limits" $gpus -}}
{{- toYaml (mergeOverwrite (deepCopy .Values.resources) (deepCopy $both)) }}
{{- end }}

{{/* Volumes of a pod with a part of the model, and where its container has them. */}}
{{- define "synthia.volumes" -}}
{{- $name := include "synthia.fullname" . -}}
- name: cache
  {{- if eq .Values.model.name "demo" }}
  emptyDir: {sizeLimit: {{ .Values.storage.cache.size }}}
  {{- else }}
  persistentVolumeClaim:
    claimName: {{ .Values.storage.cache.existingClaim | default (print $name "-cache") }}
- name: models
  persistentVolumeClaim:
    claimName: {{ .Values.storage.models.existingClaim | default (print $name "-models") }}
    readOnly: true
  {{- end }}
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.sharedMemory }}}
{{- end }}

{{- define "synthia.volumeMounts" -}}
- {name: cache, mountPath: /cache}
{{- if ne .Values.model.name "demo" }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
{{- end }}

{{/* The pod that answers HTTP. */}}
{{- define "synthia.serverPod" -}}
{{- $name := include "synthia.fullname" . -}}
{{ include "synthia.gpuPod" . }}
topologySpreadConstraints:
{{- with .Values.topologySpreadConstraints }}
  {{- toYaml . | nindent 2 }}
{{- else }}
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "synthia.selectorLabels" (list $ "server") | nindent 8 }}
{{- end }}
{{- end }}
containers:
  - name: server
    image: {{ include "synthia.image" . }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    args:
      - serve
      - --config=/etc/synthia/server.yaml
      {{- if gt (int .Values.nodes) 1 }}
      - --engine=nnodes={{ .Values.nodes }}
      - --engine=node_rank=0
      - --engine=master_addr=$(LWS_LEADER_ADDRESS)
      {{- end }}
    env:
      - {name: HF_HUB_OFFLINE, value: "1"}
      {{- range $setting, $of := dict "ACCOUNTS" .Values.accounts "LEDGER" .Values.ledger }}
      {{- if $of.secret }}
      - name: SYNTHIA_{{ $setting }}
        valueFrom:
          secretKeyRef: {name: {{ $of.secret }}, key: {{ $of.key }}}
      {{- end }}
      {{- end }}
      {{- if .Values.storage.data.enabled }}
      # The file of who used what is kept here.
      - {name: XDG_STATE_HOME, value: /data/state}
      {{- end }}
      {{- with .Values.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    ports:
      - {name: http, containerPort: 8000}
    # Up to 20 minutes: weights from a slow volume, the first compilation. Nothing else restarts a
    # server that is still starting; one that fails ends by itself.
    startupProbe:
      httpGet: {path: /health, port: http}
      periodSeconds: 5
      timeoutSeconds: 5
      failureThreshold: 240
    # /health is 503 once the engine is dead, and then the process ends anyway.
    livenessProbe:
      httpGet: {path: /health, port: http}
      periodSeconds: 10
      timeoutSeconds: 5
      failureThreshold: 3
    readinessProbe:
      httpGet: {path: /ready, port: http}
      periodSeconds: 5
      timeoutSeconds: 5
      failureThreshold: 2
    resources:
      {{- include "synthia.resources" . | nindent 6 }}
    securityContext:
      {{- include "synthia.containerSecurity" .Values.readOnlyRootFilesystem | nindent 6 }}
    volumeMounts:
      - {name: config, mountPath: /etc/synthia/server.yaml, subPath: server.yaml, readOnly: true}
      {{- if .Values.keys.secret }}
      # The whole directory: a single file would not follow changes of the Secret.
      - {name: keys, mountPath: /etc/synthia/keys, readOnly: true}
      {{- end }}
      {{- if .Values.storage.data.enabled }}
      - {name: data, mountPath: /data}
      {{- end }}
      {{- include "synthia.volumeMounts" . | nindent 6 }}
volumes:
  - name: config
    configMap:
      name: {{ $name }}
  {{- with .Values.keys.secret }}
  - name: keys
    secret: {secretName: {{ . }}, defaultMode: 0440}
  {{- end }}
  {{- if .Values.storage.data.enabled }}
  - name: data
    persistentVolumeClaim:
      claimName: {{ .Values.storage.data.existingClaim | default (print $name "-data") }}
  {{- end }}
  {{- include "synthia.volumes" . | nindent 2 }}
{{- end }}

{{/* Annotations by which pods are replaced when their configuration is another. */}}
{{- define "synthia.podAnnotations" -}}
checksum/config: {{ include "synthia.settings" . | sha256sum | trunc 16 }}
{{- with .Values.podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- end }}
