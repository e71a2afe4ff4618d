#!/usr/bin/env bash
# Debian's git, sqlite3 and busybox are installed into an environment of a guest whose
# root is a Debian, carried to a second guest that has none of it (gondola's own, with
# busybox), and used there. Nothing may be written to the Debian: its disk is compared
# on the host, file by file, by names, rights, owners, times and contents.
#   testdata/bench/env/two-guests.sh [DIR]    DIR (default in the cache) keeps the Debian
#                                            and the packages for the next time
# It takes root, debootstrap, e2fsprogs, Debian's mirror and `make build`. Each line says
# how long a step took; the exit code is 0 if all was as it should be.
#   PREPARE=1   make the Debian and fetch the packages, and no more
#   KEEP=1      leave the disks behind
#   WHOLE=1     packages that the Debian does not have from the beginning but that git
#               takes (perl, libcurl3-gnutls …) are installed into the environment, too
#   MEMORY=     of the Debian guest (default 512M)
#   PATIENCE=   seconds for a step (default 3600)
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/../../.."
top=$PWD cache=${GONDOLA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/gondola}
mkdir -p "${1:-$cache/env-debian}" && keep=$(cd "${1:-$cache/env-debian}" && pwd)
fail() { echo "env/two-guests: $*" >&2; exit 1; }
for c in debootstrap mke2fs python3; do command -v $c >/dev/null || fail "apt-get install debootstrap e2fsprogs python3"; done
[ "$(id -u)" = 0 ] || fail "debootstrap and the comparison of the disk take root"
[ -x bin/gondola ] || fail "make build first"
mirror=http://deb.debian.org/debian
packages="git git-man sqlite3 busybox"
debian=$keep/debian${WHOLE:+-whole}.img
bad=0
# gondola is given a machine's name and what to do; it never waits for ever.
gondola() { timeout "${PATIENCE:-3600}" "$top/bin/gondola" "$@"; }
step() { # WHAT COMMAND…: how long it took, and whether it worked
	local what=$1 begin=$SECONDS code=0
	shift
	"$@" || code=$?
	printf '%5d s  %s%s\n' $((SECONDS - begin)) "$what" "$([ $code = 0 ] || echo ": FAILED, $code")"
	[ $code = 0 ] || { bad=1; return $code; }
}
want() { # WHAT WANTED COMMAND…
	local what=$1 wanted=$2 out code=0 begin=$SECONDS
	shift 2
	out=$("$@" 2>&1) || code=$?
	case $out in
	*"$wanted"*) printf '%5d s  %s: %s\n' $((SECONDS - begin)) "$what" "$wanted" ;;
	*) printf '%5d s  %s: FAILED, wanted %s, got (code %d): %s\n' $((SECONDS - begin)) "$what" "$wanted" $code "$out"; bad=1 ;;
	esac
}

# The Debian, with the agent as its first process, and the packages in /debs.
if [ ! -e "$debian" ]; then
	rm -rf "$keep/root"
	more=perl,libcurl3-gnutls,liberror-perl,libreadline8,libsqlite3-0
	[ -z "${WHOLE:-}" ] || more=
	debootstrap --variant=minbase ${more:+--include=$more} bookworm "$keep/root" $mirror >"$keep/debootstrap.log" 2>&1 ||
		{ tail -5 "$keep/debootstrap.log" >&2; fail "debootstrap failed"; }
	# What they take and the Debian lacks, as its own apt says.
	mkdir -p "$keep/root/debs" && chmod 777 "$keep/root/debs"
	chroot "$keep/root" sh -ec "cd /debs; apt-get -q update; apt-get -q -y --download-only --no-install-recommends -o Dir::Cache::archives=/debs -o APT::Sandbox::User=root install $packages; rm -rf partial lock; apt-get clean; rm -rf /var/lib/apt/lists/*" >"$keep/apt.log" 2>&1 ||
		{ tail -5 "$keep/apt.log" >&2; fail "apt-get failed"; }
	chmod 755 "$keep/root/debs"
	install -m755 cmd/gondola/agentbin/gondola-agent "$keep/root/usr/local/sbin/"
	mkdir -p "$keep/root/var/lib/gondola/envs" "$keep/root/usr/lib/gondola"
	mke2fs -q -t ext4 -d "$keep/root" -L root "$debian.new" $(($(du -sm "$keep/root" | cut -f1) * 5 / 4 + 64))M
	mv "$debian.new" "$debian"
	rm -rf "$keep/root"
fi
[ -z "${PREPARE:-}" ] || exit 0

work=$(mktemp -d)
export XDG_RUNTIME_DIR=$work/run GONDOLA_STATES=$work/states
mkdir -m700 "$XDG_RUNTIME_DIR"
finish() {
	for m in debian other; do timeout 60 "$top/bin/gondola" stop --kill $m >/dev/null 2>&1 || true; done
	if [ -n "${KEEP:-}" ]; then echo "the disks are in $work" >&2; else rm -rf "$work"; fi
}
trap finish EXIT
cp --sparse=always "$debian" "$work/debian.img"
for d in tools:1G travel:512M other:1G; do
	truncate -s "${d#*:}" "$work/${d%:*}.img"
	mke2fs -q -t ext4 "$work/${d%:*}.img"
done

# sum DISK: what is on the Debian's disk, but for gondola's own tool and store, and what
# a running system keeps to itself.
sum() {
	local at=$work/mnt code=0
	mkdir -p "$at"
	cp --sparse=always "$1" "$work/sum.img"
	e2fsck -fp "$work/sum.img" >/dev/null || [ $? = 1 ] # plays the journal back
	debugfs -R "rdump / $at" "$work/sum.img" >/dev/null 2>&1
	python3 - "$at" <<'END' || code=$?
import hashlib, os, stat, sys
top, all, n = sys.argv[1], hashlib.sha256(), 0
for dir, dirs, files in os.walk(top):
    dirs.sort()
    at = dir[len(top):] or "/"
    dirs[:] = [d for d in dirs if os.path.join(at, d) not in ("/var/lib/gondola", "/usr/lib/gondola", "/run", "/tmp", "/lost+found")]
    for name in sorted(files + dirs):
        f = os.path.join(dir, name)
        s = os.lstat(f)
        all.update(repr((f[len(top):], s.st_mode, s.st_uid, s.st_gid, s.st_rdev, s.st_nlink, 0 if stat.S_ISDIR(s.st_mode) else s.st_size, 0 if stat.S_ISLNK(s.st_mode) else int(s.st_mtime))).encode())
        if stat.S_ISREG(s.st_mode):
            with open(f, "rb") as r:
                all.update(hashlib.file_digest(r, "sha256").digest() if hasattr(hashlib, "file_digest") else hashlib.sha256(r.read()).digest())
        elif stat.S_ISLNK(s.st_mode):
            all.update(os.readlink(f).encode())
        n += 1
print(n, all.hexdigest())
END
	rm -r "$at" "$work/sum.img"
	return $code
}

boot_debian() {
	gondola run -d --name debian --memory "${MEMORY:-512M}" --initrd none --disk "$work/debian.img" --disk-slots 2 \
		--cmdline "root=/dev/vda rootfstype=ext4 rw init=/usr/local/sbin/gondola-agent" >/dev/null
}

# A boot alone writes nothing that counts; if it did, this would tell it from what the
# environment does.
step "boot the Debian" boot_debian || { gondola logs debian 2>&1 | tail -20; exit 1; }
want "its base" "Debian GNU/Linux 12" gondola exec debian -- cat /etc/os-release
want "it has no git" "127" sh -c "timeout 600 '$top/bin/gondola' exec debian -- sh -c 'git --version; echo \$?'"
step "stop it" gondola stop debian
before=$(sum "$work/debian.img")
echo "         the base: $before"

step "boot it again" boot_debian || exit 1
step "attach a disk with a new environment" gondola env attach --create debian tools "$work/tools.img"
step "install $packages with dpkg" gondola env run debian tools -- sh -ec 'export DEBIAN_FRONTEND=noninteractive; dpkg -i /debs/*.deb >/var/log/dpkg.out 2>&1 || { tail -5 /var/log/dpkg.out; exit 1; }' || exit 1
use='cd /tmp; rm -rf r; git init -q r; cd r; echo text >f; git add f; git -c user.name=n -c user.email=m commit -qm first; git log --format=%s:%an; sqlite3 x.db "create table t(a); insert into t values(6*7); select a from t"; busybox expr 6 \* 7'
want "git" "git version" gondola env run debian tools -- git --version
want "git, sqlite3 and busybox at work" $'first:n\n42\n42' gondola env run debian tools -- sh -ec "$use"
want "the base has none of it" "none" gondola exec debian -- sh -c 'command -v git || command -v sqlite3 || command -v busybox || echo none'
want "dpkg of the base does not know them" "no packages found" gondola exec debian -- dpkg-query -W git
travel=$(gondola disk attach debian "$work/travel.img")
step "pack" gondola exec debian -- sh -ec "mount -t ext4 /dev/$travel /mnt; gondola-agent env pack --base tools /mnt/tools.tar.zst; ls -l /mnt/tools.tar.zst; umount /mnt"
step "take the environment's disk away" gondola env detach debian tools
step "take the other away" gondola disk detach debian "$travel"
step "stop it" gondola stop debian
after=$(sum "$work/debian.img")
if [ "$before" = "$after" ]; then echo "         the base is as it was: $after"; else echo "         FAILED: the base was changed: $after"; bad=1; fi

# Another base: gondola's own guest, with busybox and nothing of the Debian.
boot_other() { gondola run -d --name other --memory 256M --userland busybox --disk "$work/travel.img" --disk "$work/other.img" >/dev/null; }
step "boot the other guest" boot_other || exit 1
want "it has no dynamic loader" "No such file" gondola exec other -- ls /lib64/ld-linux-x86-64.so.2
gondola exec other -- sh -ec 'mkdir -p /travel /var/lib/gondola/envs; mount -t ext4 -o ro /dev/vda /travel; mount -t ext4 /dev/vdb /var/lib/gondola/envs'
all='find / -xdev ! -path /var ! -path /var/lib ! -path "/var/lib/gondola*" ! -path /usr/lib ! -path "/usr/lib/gondola*" ! -path "/run/*" ! -path "/tmp/*"'
other_sum="($all | sort | xargs stat -c '%A %u %g %n'; $all -type f -size -1000 | sort | xargs cat) | sha256sum"
gondola env ls other >/dev/null # the tool is there from now on
one=$(gondola exec other -- sh -c "$other_sum")
step "unpack" gondola exec other -- gondola-agent env unpack /travel/tools.tar.zst
want "what it lacks: nothing" "[]" gondola env check --json other tools
want "git" "git version" gondola env run other tools -- git --version
want "git, sqlite3 and busybox at work" $'first:n\n42\n42' gondola env run other tools -- sh -ec "$use"
two=$(gondola exec other -- sh -c "$other_sum")
if [ "$one" = "$two" ]; then echo "         its base is as it was"; else echo "         FAILED: its base was changed"; bad=1; fi
step "stop it" gondola stop other
exit $bad
