package snapshot_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/portpair"
	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/snapshot"
	"github.com/gondola-vmm/gondola/snapshot/ports"
	"github.com/gondola-vmm/gondola/snapshot/service"
	"github.com/gondola-vmm/gondola/snapshot/store"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/mem"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// envEndurance asks for all rounds of the tests in this file, however long they take.
const envEndurance = "GONDOLA_ENDURANCE"

// endurance is how many rounds of all, but few, are to be performed at most, and until
// when.
func endurance(all, few int, long time.Duration) (rounds int, end time.Time) {
	if os.Getenv(envEndurance) != "" {
		return all, time.Now().Add(24 * time.Hour)
	}
	return few, time.Now().Add(long)
}

// agreeing counts in a register and in memory, and stops counting when they differ.
var agreeing = firmware.Flat{Addr: 0x1000, Mode: firmware.Protected, Image: firmware.Bytes([]byte{
	0x41,                               // again: inc ecx
	0xff, 0x05, 0x00, 0x20, 0x00, 0x00, // inc dword [0x2000]
	0x3b, 0x0d, 0x00, 0x20, 0x00, 0x00, // cmp ecx, [0x2000]
	0x74, 0xf1, // je again
	0xc6, 0x05, 0x00, 0x30, 0x00, 0x00, 0x01, // mov byte [0x3000], 1
	0xeb, 0xfe, // jmp $
})}

// A counting guest that is put back ten thousand times never diverges: each time it is
// what it was, and counts on from there.
func TestTenThousandRestores(t *testing.T) {
	needkvm.Test(t)
	rounds, end := endurance(10000, 10000, 4*time.Second)
	s, err := store.Open(filepath.Join(t.TempDir(), "states"), store.Options{})
	require.NoError(t, err)
	defer s.Close()
	vm, err := vmm.New(vmm.Config{Memory: 1 << 20, Platform: vmm.Bare, Boot: agreeing})
	require.NoError(t, err)
	defer vm.Close()
	var back uint32
	value := func() uint32 {
		var b [4]byte
		require.NoError(t, vm.Memory().ReadAt(b[:], 0x2000))
		return binary.LittleEndian.Uint32(b[:])
	}
	m := snapshot.New(snapshot.Config{VM: vm, Store: s, Restored: func() { back = value() }})
	defer m.Close()
	ctx := context.Background()
	done := make(chan vmm.Exit, 1)
	go func() { done <- vm.Run(ctx) }()
	for value() == 0 {
		time.Sleep(time.Millisecond)
	}
	_, _, err = m.Save(ctx, snapshot.SaveOptions{Name: "one"})
	require.NoError(t, err)
	_, _, err = m.Restore(ctx, "one")
	require.NoError(t, err)
	was, n, pauses := back, 0, time.Duration(0)
	begin := time.Now()
	for ; n < rounds && (n < 100 || time.Now().Before(end)); n++ {
		_, times, err := m.Restore(ctx, "one")
		require.NoError(t, err)
		pauses += times.Pause
		require.Equal(t, was, back, "round %d: what it was", n)
		if n%100 == 0 {
			for i := 0; value() == was; i++ {
				require.Less(t, i, 10000, "round %d: it counts", n)
				time.Sleep(time.Millisecond)
			}
		}
		var alarm [1]byte
		require.NoError(t, vm.Memory().ReadAt(alarm[:], 0x3000))
		require.Zero(t, alarm[0], "round %d: memory and register are of different times", n)
	}
	t.Logf("%d restores in %v, pause %v each", n, time.Since(begin), pauses/time.Duration(n))
	vm.Stop()
	assert.Equal(t, vmm.Stopped, (<-done).Reason)
}

// load keeps a guest busy: timers, processes, files, the console; what it leaves
// behind tells whether anything got lost or was done twice.
const load = `
cd /tmp
beat() { n=0; while :; do n=$((n+1)); echo $n >$1.new && mv $1.new $1 && echo $n >$1.last; sleep 0.02; done; }
spawn() { n=0; while :; do n=$((n+1)); r=$(sh -c "echo $n"); [ "$r" = $n ] || echo "child $n said $r" >>wrong; sleep 0.02; done; }
up() { was=0; while :; do read u x </proc/uptime; u=${u%.*}; [ $u -ge $was ] || echo "uptime $was then $u" >>wrong; was=$u; sleep 0.05; done; }
say() { n=0; while :; do n=$((n+1)); echo "line $n" >/dev/ttyS0; sleep 0.1; done; }
for f in "beat a" "beat b" spawn up say; do $f </dev/null >/dev/null 2>&1 & echo $!; done >pids
`

// A Linux guest with two processors under load is saved and put back again and again,
// and goes on as if nothing had happened. Its memory is each time, byte for byte, what it
// was when it stood still for the save. With many rounds the guest is asked every tenth
// time only: asking takes it seconds on PVM hosts, which only need its load.
func TestLinuxEndurance(t *testing.T) {
	const few = 3
	rounds, _ := endurance(200, few, 0)
	asked := 1
	if rounds > few {
		asked = 10
	}
	g := vmmtest.Boot(t, guest.Config{VCPUs: 2, Memory: 128 << 20, RNG: true})
	s, err := store.Open(filepath.Join(t.TempDir(), "states"), store.Options{Buffer: 64 << 20})
	require.NoError(t, err)
	defer s.Close()
	saved := make([]byte, g.VM().Memory().Size())
	m := snapshot.New(snapshot.Config{VM: g.VM(), Store: s, Restored: func() {
		compare(t, g.VM().Memory(), saved)
		g.Renew()
	}})
	defer m.Close()
	g.Sh(t, load)
	last := ""
	r := rand.New(rand.NewPCG(7, 8))
	for i := range rounds {
		ctx := vmmtest.Context(t)
		name := fmt.Sprint("round", i)
		_, _, err := m.Save(ctx, snapshot.SaveOptions{Name: name, Taken: func() { assert.NoError(t, vmmtest.ReadMemory(g.VM().Memory(), saved)) }})
		require.NoError(t, err)
		ask := (i+1)%asked == 0
		if ask {
			g.Sh(t, "echo gone >/tmp/gone; rm -f /tmp/a.last")
		} else {
			goesOn(t, g, r.IntN(1000))
		}
		_, _, err = m.Restore(ctx, name)
		require.NoError(t, err)
		if ask {
			t.Logf("round %d: beat %d", i, lively(t, g))
		} else {
			goesOn(t, g, 100+r.IntN(1000))
		}
		if last != "" {
			require.NoError(t, s.Delete(ctx, last))
		}
		last = name
	}
	assert.Contains(t, string(g.Log()), "line ", "the console")
	require.NoError(t, g.Shutdown(vmmtest.Context(t)))
}

// lively asks a guest under load, which was put back, whether nothing is gone, nothing
// wrong and all goes on. It returns how often a has beaten.
func lively(t *testing.T, g *vmmtest.Guest) int {
	t.Helper()
	out := strings.Fields(g.Sh(t, `cd /tmp; [ ! -e gone ] || echo "what came after the save is there"
kill -0 $(cat pids) || echo "a process is gone"
cat wrong 2>/dev/null; was=$(cat a b); i=0
until [ "$(cat a)" != "${was%%
*}" ] && [ "$(cat b)" != "${was##*
}" ]; do i=$((i+1)); [ $i -lt 600 ] || { echo "stands still"; break; }; sleep 0.05; done
cat a; dmesg | grep -i -e 'bug:' -e 'oops' -e 'call trace' -e 'kernel panic' || :`))
	require.Len(t, out, 1, "%v", out)
	n, err := strconv.Atoi(out[0])
	require.NoError(t, err)
	assert.Positive(t, n)
	return n
}

// goesOn waits until a guest under load has left guest mode n times more.
func goesOn(t *testing.T, g *vmmtest.Guest, n int) {
	t.Helper()
	exits := func() (n uint64) {
		for _, v := range g.VM().Stats().Exits {
			n += v
		}
		return n
	}
	for was, end := exits(), time.Now().Add(time.Minute); exits() < was+uint64(n); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the guest stands still: %d exits in a minute", exits()-was)
		}
	}
}

// kvmWrites is how many bytes of a page KVM itself may write when a state is loaded:
// the time of day, where the guest wants it (MSR_KVM_WALL_CLOCK_NEW, 16 bytes), and the
// clocks of two vCPUs (MSR_KVM_SYSTEM_TIME_NEW, 32 bytes), which Linux keeps 64 apart.
const kvmWrites = 64 + 32

// compare finds out whether the memory of a frozen machine is what it was.
func compare(t *testing.T, m *mem.Memory, was []byte) {
	now := make([]byte, len(was))
	assert.NoError(t, vmmtest.ReadMemory(m, now))
	for p := 0; p < len(now); p += mem.PageSize {
		a, b := was[p:p+mem.PageSize], now[p:p+mem.PageSize]
		if bytes.Equal(a, b) {
			continue
		}
		first, last := 0, mem.PageSize-1
		for a[first] == b[first] {
			first++
		}
		for a[last] == b[last] {
			last--
		}
		if n := last + 1 - first; n > kvmWrites {
			t.Errorf("the page at offset %#x of memory differs in %d bytes from %#x on:\n% x\n% x", p, n, first,
				a[first:min(last+1, first+64)], b[first:min(last+1, first+64)])
		}
	}
}

// A guest without a kernel saves itself and goes back, over raw I/O ports.
func TestTinyGuestFromInside(t *testing.T) {
	needkvm.Test(t)
	pair := portpair.New(portpair.Config{GSI: portpair.GSI})
	vm, err := vmm.New(vmm.Config{
		Memory: 4 << 20, Boot: vmmtest.Assemble(t, "../testdata/guests/states.s"),
		Devices: []vmm.Device{attach(func(s *vmm.Slots) error { return pair.Attach(s) })},
	})
	require.NoError(t, err)
	defer vm.Close()
	for _, r := range []struct {
		at   uint64
		id   uint32
		op   string
		args any
	}{
		{0x5000, 1, ports.OpSave, ports.SaveRequest{Name: "one"}},
		{0x6000, 2, ports.OpRestore, ports.RestoreRequest{Name: "one"}},
	} {
		args, err := proto.Marshal(r.args)
		require.NoError(t, err)
		request := ports.Request{ID: r.id, Op: r.op, Args: args, Principal: "app", Secret: "s3cret"}
		frame, err := request.Append(nil)
		require.NoError(t, err)
		frame = append(binary.LittleEndian.AppendUint32(nil, uint32(len(frame))), frame...)
		require.NoError(t, vm.Memory().WriteAt(frame, mem.Addr(r.at)))
	}
	s, err := store.Open(filepath.Join(t.TempDir(), "states"), store.Options{})
	require.NoError(t, err)
	defer s.Close()
	m := snapshot.New(snapshot.Config{VM: vm, Store: s})
	defer m.Close()
	requests := service.New(service.Config{Auth: anybody{}, Ops: snapshot.Ops(func(context.Context) (*snapshot.Manager, error) { return m, nil })})
	defer requests.Close()
	require.NoError(t, requests.Attach("ports", pair.A(), pair.B()))
	e := vm.Run(vmmtest.Context(t))
	require.Equal(t, vmm.Exited, e.Reason, "%v", e)
	assert.EqualValues(t, 42, e.Code)
	assert.Equal(t, "one", m.Current())
}

// attach is a vmm.Device.
type attach func(*vmm.Slots) error

func (a attach) Attach(s *vmm.Slots) error { return a(s) }
