package guest_test

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/guest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// resources are what this process has of the host.
type resources struct {
	threads, files, mappings, goroutines int
	rss                                  uint64 // bytes
}

func usage(t *testing.T) resources {
	t.Helper()
	debug.FreeOSMemory()
	count := func(dir string) int {
		es, err := os.ReadDir(dir)
		require.NoError(t, err)
		return len(es)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	require.NoError(t, err)
	statm, err := os.ReadFile("/proc/self/statm")
	require.NoError(t, err)
	pages, err := strconv.ParseUint(strings.Fields(string(statm))[1], 10, 64)
	require.NoError(t, err)
	return resources{
		threads:    count("/proc/self/task"),
		files:      count("/proc/self/fd"),
		mappings:   strings.Count(string(maps), "gondola") + strings.Count(string(maps), "kvm"),
		goroutines: runtime.NumGoroutine(),
		rss:        pages * uint64(os.Getpagesize()),
	}
}

// Linux guests, one after the other and ended in different ways, leave nothing
// behind: no thread, descriptor, mapping, goroutine or memory.
// GONDOLA_LEAK_BOOTS is how many (default 3).
func TestGuestNoLeaks(t *testing.T) {
	needkvm.Test(t)
	boots := 3
	if s := os.Getenv("GONDOLA_LEAK_BOOTS"); s != "" {
		var err error
		boots, err = strconv.Atoi(s)
		require.NoError(t, err, "GONDOLA_LEAK_BOOTS")
	}
	ends := []func(*testing.T, *vmmtest.Guest){
		func(t *testing.T, g *vmmtest.Guest) { // the guest powers off
			require.NoError(t, g.Shutdown(g.Within(t)))
			assert.Contains(t, []vmm.Reason{vmm.Reset, vmm.Halted}, g.Ended(t).Reason)
		},
		func(t *testing.T, g *vmmtest.Guest) { // the machine is closed with a command under way
			p, err := g.Agent().Start(g.Within(t), guestagent.Command{Args: []string{"sleep", "1000"}})
			require.NoError(t, err)
			require.NoError(t, g.Close())
			_, err = p.Wait(vmmtest.Context(t))
			assert.Error(t, err)
		},
		func(t *testing.T, g *vmmtest.Guest) { // the machine is stopped
			g.VM().Stop()
			assert.Equal(t, vmm.Stopped, g.Ended(t).Reason)
		},
	}
	var first resources
	for i := range boots {
		t.Run(fmt.Sprint("boot ", i+1), func(t *testing.T) {
			g := vmmtest.Boot(t, guest.Config{VCPUs: 1 + i%2, Memory: 96 << 20})
			ends[i%len(ends)](t, g)
			require.NoError(t, g.Close())
		})
		now := usage(t)
		t.Logf("after boot %d: %+v", i+1, now)
		if i == 0 {
			first = now // the first use of everything is no leak
			continue
		}
		assert.LessOrEqual(t, now.threads, first.threads+3, "threads") // the Go runtime keeps a few
		assert.LessOrEqual(t, now.files, first.files, "descriptors")
		assert.Equal(t, first.mappings, now.mappings, "mappings")
		assert.LessOrEqual(t, now.goroutines, first.goroutines+1, "goroutines")
		assert.LessOrEqual(t, now.rss, first.rss+16<<20, "resident memory")
	}
}
