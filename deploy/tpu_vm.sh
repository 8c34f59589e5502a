#!/usr/bin/env bash
# One run on a Cloud TPU slice of several hosts, without Kubernetes. In this order:
#   deploy/tpu_vm.sh create  my-slice us-east5-a v5p-32 v2-alpha-tpuv5
#   deploy/tpu_vm.sh install my-slice us-east5-a
#   deploy/tpu_vm.sh mount   my-slice us-east5-a 10.0.0.2:/runs       # an NFS share (Filestore): all hosts see one folder
#   deploy/tpu_vm.sh train   my-slice us-east5-a --preset alfworld-paper qwen2.5-1.5b
#   deploy/tpu_vm.sh logs    my-slice us-east5-a                      # of the first host; Ctrl-C ends the reading alone
#   deploy/tpu_vm.sh stop    my-slice us-east5-a                      # after the step at hand, which is saved
#   deploy/tpu_vm.sh delete  my-slice us-east5-a
# The run goes on when this machine is disconnected. `train` again resumes it. HF_TOKEN and ALFWORLD_DATA (a folder on the hosts) are
# passed on if they are set. From the root of the repository; needs gcloud, signed in.
set -euo pipefail

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }

[ $# -ge 3 ] || usage
action=$1 name=$2 zone=$3
shift 3

on_hosts() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"; }
on_all_hosts() { on_hosts all "$1"; }

case $action in
    create)
        [ $# = 2 ] || usage
        gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$1" --version="$2"
        ;;
    install)
        # Committed files alone. Images of TPU VMs are Ubuntu 22.04, whose own Python is older than 3.11.
        git archive --format=tar.gz --output=/tmp/aem_jax.tar.gz HEAD
        gcloud compute tpus tpu-vm scp /tmp/aem_jax.tar.gz "$name:" --zone="$zone" --worker=all
        on_all_hosts 'set -e
            sudo apt-get update -qq && sudo apt-get install -y -qq python3.11 python3.11-venv nfs-common
            mkdir -p aem_jax && tar -xzf aem_jax.tar.gz -C aem_jax && cd aem_jax
            PYTHON=python3.11 bash scripts/make_venv.sh .venv
            .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[tpu]"'
        ;;
    mount)
        [ $# = 1 ] || usage
        on_all_hosts "sudo mkdir -p /runs && sudo mount -t nfs $1 /runs && sudo chmod 1777 /runs"
        ;;
    train)
        # One download of a model for all hosts, which see /runs.
        variables=HF_HUB_CACHE=/runs/.huggingface/hub
        for variable in HF_TOKEN ALFWORLD_DATA; do
            [ -z "${!variable:-}" ] || variables+=$(printf ' %q' "$variable=${!variable}")
        done
        arguments=$(printf ' %q' "$@")
        on_all_hosts "cd aem_jax || exit 1
            if [ -e pid ] && kill -0 \$(cat pid) 2>/dev/null; then echo 'a run is under way' >&2; exit 1; fi
            nohup env $variables .venv/bin/python -m aem_jax.launch --runs-dir /runs$arguments >>log 2>&1 </dev/null &
            echo \$! >pid"
        ;;
    logs)
        on_hosts 0 'tail -n 100 -f aem_jax/log'
        ;;
    stop)
        on_all_hosts 'cd aem_jax && pid=$(cat pid) && kill -TERM "$pid" || exit 1
            while kill -0 "$pid" 2>/dev/null; do sleep 1; done
            tail -n 3 log'
        ;;
    delete)
        gcloud compute tpus tpu-vm delete "$name" --zone="$zone"
        ;;
    *) usage ;;
esac
