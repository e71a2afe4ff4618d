package guest_test

import (
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
)

// gate is a writer that takes nothing until it is opened, and counts.
type gate struct {
	mu    sync.RWMutex
	taken atomic.Int64
}

func (g *gate) Write(p []byte) (int, error) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	g.taken.Add(int64(len(p)))
	return len(p), nil
}

// A guest that floods both of its consoles, one of which nobody reads at first,
// costs no memory and stays usable; then its kernel panics, and that is a typed exit with
// the kernel's last words in the log.
func TestGuestFloodAndPanic(t *testing.T) {
	hvc := &gate{}
	hvc.mu.Lock()
	open := sync.OnceFunc(hvc.mu.Unlock)
	defer open()
	g := vmmtest.Boot(t, guest.Config{Console: guest.VirtioConsole, Output: hvc})
	ctx := g.Within(t)

	before := usage(t)
	flood, err := g.Agent().Start(ctx, guestagent.Command{Args: sh("yes flood of hvc0 >/dev/hvc0 & yes flood of ttyS0 >/dev/ttyS0")})
	require.NoError(t, err)
	// Linux' driver waits for the host with its processor while hvc0's other end
	// takes nothing: back pressure, and no place where memory could go.
	time.Sleep(time.Second) // not a synchronisation: room for memory to go
	assert.Zero(t, hvc.taken.Load())
	open()
	serial := func() uint64 { return g.VM().Stats().Exits["KVM_EXIT_IO"] }
	for start := serial(); serial() < start+100 || hvc.taken.Load() < 2<<10; {
		require.NoError(t, g.Agent().Ping(ctx))
	}
	assert.LessOrEqual(t, len(g.Log()), 64<<10)
	// The guest may have touched all of its memory meanwhile, this process has
	// it mapped.
	assert.Less(t, usage(t).rss, before.rss+128<<20+16<<20)

	require.NoError(t, flood.Signal(syscall.SIGKILL))
	_, err = flood.Wait(ctx)
	require.NoError(t, err)

	sleep, err := g.Agent().Start(ctx, guestagent.Command{Args: []string{"sleep", "1000"}})
	require.NoError(t, err)
	_, err = g.Agent().Start(ctx, guestagent.Command{Args: sh("echo c >/proc/sysrq-trigger")})
	require.NoError(t, err)
	exit := g.Ended(t)
	assert.Equal(t, vmm.Reset, exit.Reason, "%v", exit)
	assert.Contains(t, string(g.Log()), "Kernel panic")
	_, err = sleep.Wait(vmmtest.Context(t))
	assert.Error(t, err, "a command of a dead guest")
	require.ErrorIs(t, g.VM().Pause(ctx), vmm.ErrEnded)
}
