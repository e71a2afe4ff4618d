//go:build linux && amd64

package intercept

import (
	"encoding/binary"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// run is the kernel's machine for filters, as far as they use it. It gives the answer
// and how many instructions that took.
func run(t *testing.T, p []unix.SockFilter, nr, arch uint32, args ...uint64) (answer uint32, steps int) {
	var data [64]byte
	binary.LittleEndian.PutUint32(data[offNr:], nr)
	binary.LittleEndian.PutUint32(data[offArch:], arch)
	for i, a := range args {
		binary.LittleEndian.PutUint64(data[16+8*i:], a)
	}
	a := uint32(0)
	for pc := 0; ; pc++ {
		require.Less(t, pc, len(p), "behind the program's end")
		steps++
		i, cond := p[pc], false
		switch i.Code {
		case bpfLd:
			a = binary.LittleEndian.Uint32(data[i.K:])
			continue
		case bpfRet:
			return i.K, steps
		case bpfJa:
			pc += int(i.K)
			continue
		case bpfJeq:
			cond = a == i.K
		case bpfJge:
			cond = a >= i.K
		case bpfJst:
			cond = a&i.K != 0
		default:
			t.Fatalf("instruction %d: %#x", pc, i.Code)
		}
		if cond {
			pc += int(i.Jt)
		} else {
			pc += int(i.Jf)
		}
	}
}

// Every call there is gets the answer that the tables say, soon.
func TestFilter(t *testing.T) {
	p := filter()
	assert.Less(t, len(p), 4096, "BPF_MAXINSNS")
	const anything = ^uint64(0)
	all := []uint64{anything, anything, anything, anything, anything, anything}
	for nr := range uint32(lastCall + 100) {
		want := uint32(retAllow)
		if e := refused[nr]; e != 0 {
			want = retErrno | uint32(e)
		}
		if slices.Contains(named, nr) {
			want = retUser
		}
		switch nr {
		case unix.SYS_SECCOMP:
			want = retErrno | uint32(unix.EBUSY)
		case unix.SYS_UNSHARE, unix.SYS_CLONE:
			want = retErrno | uint32(unix.EPERM)
		}
		if nr > lastCall {
			want = retErrno | uint32(unix.ENOSYS)
		}
		got, steps := run(t, p, nr, archX8664, all...)
		require.Equal(t, want, got, "call %d", nr)
		require.Less(t, steps, 32, "call %d", nr)
		got, _ = run(t, p, nr, 0x40000003, all...)
		require.EqualValues(t, retErrno|uint32(unix.ENOSYS), got, "i386")
		got, _ = run(t, p, nr|1<<30, archX8664, all...)
		require.EqualValues(t, retErrno|uint32(unix.ENOSYS), got, "x32")
	}
	for _, tt := range []struct {
		nr   uint32
		args []uint64
		want uint32
	}{
		{unix.SYS_SENDTO, []uint64{1, 2, 3, 4, 0, 6}, retAllow},
		{unix.SYS_SENDTO, []uint64{1, 2, 3, 4, 1 << 32, 6}, retUser},
		{unix.SYS_SENDTO, []uint64{1, 2, 3, 4, 1, 6}, retUser},
		{unix.SYS_SHMGET, []uint64{unix.IPC_PRIVATE}, retAllow},
		{unix.SYS_MSGGET, []uint64{7}, retUser},
		{unix.SYS_SECCOMP, []uint64{unix.SECCOMP_SET_MODE_FILTER, 0}, retAllow},
		{unix.SYS_SECCOMP, []uint64{unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER}, retErrno | uint32(unix.EBUSY)},
		{unix.SYS_CLONE, []uint64{unix.CLONE_VM | unix.CLONE_THREAD}, retAllow},
		{unix.SYS_CLONE, []uint64{unix.CLONE_NEWUSER}, retErrno | uint32(unix.EPERM)},
		{unix.SYS_UNSHARE, []uint64{unix.CLONE_NEWNET}, retAllow},
		{unix.SYS_READ, []uint64{0}, retAllow},
	} {
		got, _ := run(t, p, tt.nr, archX8664, tt.args...)
		assert.Equal(t, tt.want, got, "call %d, %v", tt.nr, tt.args)
	}
}
