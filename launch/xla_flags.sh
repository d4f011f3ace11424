# shellcheck shell=bash
# Sourced by the launchers: the XLA flags that matter on many devices, each with its reason.
#
#   xla_flags tpu|gpu     adds to what LIBTPU_INIT_ARGS or XLA_FLAGS hold already

xla_flags() {
  local flags=()
  case "$1" in
    tpu)
      # fsdp gathers weights layer by layer: start each gather early and hide it behind the layer
      # before. The fusions let a collective run in steps beside the matrix units.
      flags=(
        --xla_enable_async_all_gather=true
        --xla_tpu_enable_async_collective_fusion=true
        --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
        --xla_tpu_enable_async_collective_fusion_multiple_steps=true
        --xla_tpu_overlap_compute_collective_tc=true
      )
      export LIBTPU_INIT_ARGS="${flags[*]} ${LIBTPU_INIT_ARGS:-}"
      ;;
    gpu)
      # the scheduler that moves collectives ahead of the compute that hides them; off by default
      flags=(--xla_gpu_enable_latency_hiding_scheduler=true)
      export XLA_FLAGS="${flags[*]} ${XLA_FLAGS:-}"
      ;;
  esac
}
