#!/usr/bin/env bash
# fio on a file of the host, in a guest of gondola's and in one of QEMU's TCG, with the
# same kernel, the same /init and files of the same size, one after the other.
#   testdata/bench/disk/run.sh [SECONDS]    of each of the four jobs (default 5)
# It takes fio, qemu-system-x86 and `make build`. Without /dev/kvm gondola's guest runs
# on an emulated host (.ci/kvmhost) and is emulated twice then, QEMU's once: each has
# its own line for its host's file, and only ratios to that one mean something.
set -euo pipefail
cd "$(dirname "$0")/../../.."
seconds=${1:-5}
fail() { echo "bench/disk: $*" >&2; exit 1; }
for c in fio mke2fs cpio busybox; do command -v $c >/dev/null || fail "apt-get install fio e2fsprogs cpio busybox-static"; done
gondola=$PWD/bin/gondola kernel=$("$PWD/bin/gondola" kernel path)
size=128
jobs="randread:4k randwrite:4k read:1m write:1m"
fio_args="--direct=1 --ioengine=psync --time_based --runtime=$seconds --size=${size}m --output-format=terse --terse-version=3 --thread"
# Of a line of fio's: IOPS and KiB/s, of reading and writing together.
numbers='function show(w) { split($0, f, ";"); printf "%-24s %-14s %8d IOPS %8.1f MiB/s\n", w, f[3], f[8] + f[49], (f[7] + f[48]) / 1024 } /^3;/ { show(who) }'

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
host_file() { # WHO
	truncate -s ${size}M "$work/host.img"
	for j in $jobs; do fio $fio_args --name="${j%:*}-${j#*:}" --filename="$work/host.img" --rw="${j%:*}" --bs="${j#*:}" --direct=0; done | awk -v who="$1" "$numbers"
	rm "$work/host.img"
}

# The guest: busybox, fio and its libraries on a read-only disk.
mkdir -p "$work/tools" "$work/root"/{bin,dev,proc,sys,t}
cp -L "$(command -v fio)" $(ldd "$(command -v fio)" | grep -o '/[^ ]*') "$work/tools/"
mke2fs -q -t ext4 -d "$work/tools" "$work/tools.img" $(($(du -sm "$work/tools" | cut -f1) * 5 / 4 + 16))M >/dev/null
cp "$(command -v busybox)" "$work/root/bin/busybox"
cat >"$work/root/init" <<END
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mount -t ext4 -o ro /dev/vda /t
for j in $jobs; do
	/t/ld-linux-x86-64.so.2 --library-path /t /t/fio $fio_args --name="\${j%:*}-\${j#*:}" --filename=/dev/vdb --rw="\${j%:*}" --bs="\${j#*:}"
done
echo done
reboot -f
END
chmod +x "$work/root/init"
(cd "$work/root" && find . | cpio -o -H newc --quiet >"$work/initrd")
guest() { # WHO COMMAND…
	truncate -s ${size}M "$work/data.img"
	timeout $((400 + 30 * seconds)) "${@:2}" </dev/null >"$work/out" 2>&1 || true
	grep -q "^done" "$work/out" || { tail -30 "$work/out" >&2; fail "$1 did not come to its end"; }
	tr -d '\r' <"$work/out" | awk -v who="$1" "$numbers"
	rm "$work/data.img"
}

if [ "${BENCH_DISK_INSIDE:-}" = "" ]; then
	host_file "this host's file"
	guest "QEMU TCG" qemu-system-x86_64 -M microvm,acpi=off,isa-serial=on,pic=on,pit=on,rtc=on -global virtio-mmio.force-legacy=false -accel tcg -cpu max -m 256 -nodefaults -no-user-config -no-reboot -display none -serial stdio \
		-kernel "$kernel" -initrd "$work/initrd" -append "console=ttyS0 reboot=t quiet" \
		-drive id=a,file="$work/tools.img",format=raw,if=none,readonly=on -device virtio-blk-device,drive=a \
		-drive id=b,file="$work/data.img",format=raw,if=none -device virtio-blk-device,drive=b
	[ -w /dev/kvm ] || exec env BENCH_DISK_INSIDE=1 .ci/kvmhost --timeout $((200 + 30 * seconds)) -- "$0" "$seconds"
fi
where="" && [ "${BENCH_DISK_INSIDE:-}" = "" ] || where=", emulated host"
[ -z "$where" ] || host_file "the emulated host's file"
guest "gondola$where" "$gondola" run --cold --kernel "$kernel" --initrd "$work/initrd" --memory 256M --console serial --cmdline "reboot=t quiet" \
	--disk "$work/tools.img,ro" --disk "$work/data.img"
