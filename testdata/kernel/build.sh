#!/usr/bin/env bash
# build.sh SOURCE OUT: builds the guest kernel.
#
# SOURCE is a Linux source tarball (Debian: /usr/src/linux-source-6.1.tar.xz),
# OUT a directory that gets vmlinux (uncompressed ELF), bzImage, config,
# System.map and versions. The configuration is tinyconfig plus gondola.config,
# which is expected beside this script. JOBS is the number of compilers at once.
#
# Lines that begin with "@" say how far it is; all else is output of the tools.
# The result depends on the source, the fragment, this script and the compiler
# only, not on the time, the user, the host or the directory.
set -euo pipefail

[ $# = 2 ] || { echo "usage: $0 SOURCE OUT" >&2; exit 2; }
source=$(realpath "$1") out=$(realpath "$2")
fragment=$(realpath "$(dirname "$0")")/gondola.config
tree=$out/tree

unset MAKEFLAGS MFLAGS MAKELEVEL MAKEOVERRIDES CROSS_COMPILE KBUILD_OUTPUT CFLAGS
export LC_ALL=C ARCH=x86_64
export KBUILD_BUILD_TIMESTAMP='2025-01-01 00:00:00 UTC' KBUILD_BUILD_VERSION=1
export KBUILD_BUILD_USER=gondola KBUILD_BUILD_HOST=gondola
# Calls instead of inline "rep movs/stos": a repeated instruction is emulated
# once per element where the guest's ring 0 is emulated.
export KCFLAGS=-mstringop-strategy=libcall
jobs=${JOBS:-$(nproc)}

echo "@unpack"
rm -rf "$tree"
mkdir "$tree"
# Left out is only what an x86 kernel without graphics never reads (400 MB).
tar -x -f "$source" -C "$tree" --strip-components=1 --no-same-owner \
	--checkpoint=1000 --checkpoint-action='echo=@unpack %u' \
	--exclude='*/arch/*/boot/dts' --exclude='*/drivers/gpu/drm/amd/include' \
	--exclude='*/tools/testing' --exclude='*/tools/perf' 2>&1

echo "@configure"
cd "$tree"
make -s tinyconfig
scripts/kconfig/merge_config.sh -m .config "$fragment" >/dev/null
make -s olddefconfig
# Kconfig drops what it cannot fulfil without a word.
refused=0
while read -r line; do
	case $line in
	CONFIG_*=*) option=${line%%=*} ;;
	'# CONFIG_'*' is not set') option=${line#\# } option=${option%% *} ;;
	*) continue ;;
	esac
	got=$(grep -E "^$option=" .config || echo "# $option is not set")
	if [ "$got" != "$line" ]; then
		echo "gondola.config asks for \"$line\", but Kconfig made it \"$got\""
		refused=1
	fi
done <"$fragment"
[ $refused = 0 ] || exit 3

echo "@compile"
nice -n 5 make -j"$jobs" vmlinux bzImage

echo "@store"
strip --strip-debug -o "$out/vmlinux" vmlinux
cp arch/x86/boot/bzImage "$out/bzImage"
cp System.map "$out/System.map"
cp .config "$out/config"
{
	echo "source=$(make -s kernelversion)"
	echo "release=$(make -s kernelrelease)"
	echo "compiler=$(gcc --version | head -n 1)"
} >"$out/versions"
cd "$out"
rm -rf "$tree"
