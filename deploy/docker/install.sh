#!/bin/sh
# Makes an image's virtual environment: install.sh CUDA_VERSION|cpu [EXTRA ...], in a folder with pyproject.toml and
# constraints.txt; VIRTUAL_ENV, TORCH_VERSION and TORCH_INDEX (may be empty) are in the environment.
set -eu

want=${1%.*} # DeepSpeed and nvcc compare the first two parts of CUDA's version
shift
for extra; do
    shift
    set -- "$@" --extra "$extra"
done

# constraints.txt pins torch for machines without GPUs; an image has its own pin, and all else as it was tested.
pins=$(mktemp)
sed "s/^torch==.*/torch==$TORCH_VERSION/" constraints.txt >"$pins"
uv venv --python "$(realpath "$(command -v python3)")" "$VIRTUAL_ENV"

# torch goes first, as in the Makefile: packages that ask for a torch then find the one that is wanted.
if [ -n "$TORCH_INDEX" ]; then
    uv pip install --constraint "$pins" --index-url "$TORCH_INDEX" torch
elif [ "$want" = cpu ]; then
    uv pip install --constraint "$pins" --torch-backend cpu torch
else
    uv pip install --constraint "$pins" torch
fi
uv pip install --constraint "$pins" --requirement pyproject.toml "$@"
rm "$pins"

# Another torch would be found late: as gigabytes too many, or where DeepSpeed refuses to compile for it.
version=$(echo "$VIRTUAL_ENV"/lib/python3*/site-packages/torch/version.py)
found=$("$VIRTUAL_ENV/bin/python" -c "import runpy; print(runpy.run_path('$version')['cuda'] or 'cpu')")
if [ "$found" != "$want" ]; then
    echo "torch $TORCH_VERSION was built for $found, and this image is for $want: set TORCH_INDEX, or CUDA_VERSION" >&2
    exit 1
fi
