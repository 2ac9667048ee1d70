#!/usr/bin/env bash
# Build the image for real without a daemon, a GPU or a registry, and use it as an ordinary user. As root, on Debian or
# Ubuntu with buildah and debootstrap (`make image-check`); some 5 GB of disk in TMPDIR, 10 minutes.
#
# A Debian root takes the place of the CUDA base, so that all of the Dockerfile but its first line is tried: packages,
# the install with the versions of constraints.txt, the entry point; then a dataset and a training as user 1000.
#   BUILD_OPTIONS   more options for `buildah build` and `buildah run`, such as volumes with a proxy's files
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp --directory --tmpdir sharebert-image-XXXXXX)
buildah=(buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs)
read -ra options <<< "${BUILD_OPTIONS:-}"
trap '"${buildah[@]}" rm --all > /dev/null; rm -rf "$work"' EXIT

echo "== a Debian root in place of the CUDA base"
debootstrap --variant=minbase bookworm "$work/root" > "$work/debootstrap.log"
base=$("${buildah[@]}" from scratch)
"${buildah[@]}" add --quiet "$base" "$work/root" / > /dev/null
"${buildah[@]}" commit --quiet "$base" base > /dev/null
"${buildah[@]}" rm "$base" > /dev/null
rm -rf "$work/root"

echo "== docker/Dockerfile"
"${buildah[@]}" build --isolation chroot --format docker --build-arg BASE=localhost/base --pull-never "${options[@]}" \
    --file docker/Dockerfile --tag sharebert .

image=$("${buildah[@]}" from --pull-never localhost/sharebert)
run() {
    "${buildah[@]}" run --isolation chroot "${options[@]}" --user "$1" "$image" -- bash -euc "$2"
}
echo "== the libraries of InfiniBand"
run root 'ldconfig -p | grep --only-matching --extended-regexp "lib(ibverbs|rdmacm)\.so\.1" | sort --unique; ls /usr/lib/*/libibverbs'
run root 'install --directory --owner 1000 /work/user'

echo "== a dataset, a training, an export and a filled mask, as user 1000"
run 1000 'export HOME=/work/user; cd /work/user
mkdir texts; for i in $(seq 400); do echo "The cat number $i sat on the mat and looked at the moon over town $((i % 7))."; done > texts/a.txt
sharebert prep demo-data source.paths=texts source.document=line output=data validation=0.1
sharebert train demo data=data run=run steps=3 data.global_batch=4 data.micro_batch=4 validate.rows=8 \
    model.hidden_size=8 model.intermediate_size=12 model.factor_size=8 model.num_attention_heads=2
sharebert consolidate run export
sharebert fill "The cat sat on the [MASK]." export'
