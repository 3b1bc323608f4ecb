#!/bin/sh
# Install Byteloom from the present folder into /opt/byteloom, for the Dockerfile and for the recipe of Apptainer.
#
#   PIP_OPTIONS   further options of pip, such as an index of CPU builds of torch
#   EXTRAS        optional dependencies: hf, harness, or both with a comma
set -eu
export DEBIAN_FRONTEND=noninteractive DS_BUILD_OPS=0
apt-get update
# A C++ compiler is needed by one kernel and by torch.compile.
apt-get install --yes --no-install-recommends ca-certificates g++ python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*
python3 -m venv /opt/byteloom
# The lock pins versions, also of packages that are not installed here.
/opt/byteloom/bin/pip install --no-cache-dir ${PIP_OPTIONS:-} --constraint requirements.lock ".[${EXTRAS:-}]"
/opt/byteloom/bin/byteloom --version
