#!/bin/sh
# Steps of the Dockerfile and of the recipe of Apptainer:
#
#   install.sh system     packages of Debian or Ubuntu
#   install.sh byteloom   Byteloom from the present folder, in /opt/byteloom
#
#   PIP_OPTIONS   further options of pip, such as an index of CPU builds of torch
#   EXTRAS        optional dependencies: hf, harness, or both with a comma
set -eu
case $1 in
system)
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    # One kernel and torch.compile need a C++ compiler.
    apt-get install --yes --no-install-recommends ca-certificates g++ python3 python3-dev python3-venv
    rm -rf /var/lib/apt/lists/*
    ;;
byteloom)
    python3 -m venv /opt/byteloom
    # The lock pins versions, also of packages that are not installed here.
    DS_BUILD_OPS=0 /opt/byteloom/bin/pip install --no-cache-dir ${PIP_OPTIONS:-} --constraint requirements.lock \
        ".${EXTRAS:+[$EXTRAS]}"
    /opt/byteloom/bin/byteloom --version
    ;;
*)
    echo "usage: install.sh system|byteloom" >&2
    exit 2
    ;;
esac
