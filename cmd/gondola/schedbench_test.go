//go:build !lean

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/devices/iostat"
	"github.com/gondola-vmm/gondola/devices/ratelimit"
	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// quiet is a machine that does nothing, with one vCPU thread and two devices.
type quiet struct {
	tid    int
	done   chan struct{}
	client *guestagent.Client
}

func (q *quiet) Agent() *guestagent.Client   { return q.client }
func (q *quiet) Pause(context.Context) error { return nil }
func (q *quiet) Resume() error               { return nil }
func (q *quiet) Stop()                       {}
func (q *quiet) Done() <-chan struct{}       { return q.done }
func (q *quiet) Stats() vmm.Stats {
	return vmm.Stats{Exits: map[string]uint64{"KVM_EXIT_IO": 3, "KVM_EXIT_MMIO": 5}, Threads: []int{q.tid}}
}
func (q *quiet) Requests() *control.Requests                { return &control.Requests{Performed: 1} }
func (q *quiet) Limiter(string) (*ratelimit.Limiter, error) { return &ratelimit.Limiter{}, nil }
func (q *quiet) AttachDisk(control.Disk) (string, error)    { return "", errors.ErrUnsupported }
func (q *quiet) DetachDisk(string) error                    { return errors.ErrUnsupported }
func (q *quiet) Devices() []iostat.Info {
	return []iostat.Info{{Name: "vda", Kind: "disk"}, {Name: "net0", Kind: "net"}}
}

// BenchmarkMonitor is the part of a processor that gondola sched run takes for 32
// machines, looking once a second: %core is its own and that of the machines'
// answers, which come over their control sockets from threads of this process.
func BenchmarkMonitor(b *testing.B) {
	for _, machines := range []int{8, 32} {
		b.Run(fmt.Sprintf("machines=%d", machines), func(b *testing.B) {
			b.Setenv("XDG_STATE_HOME", b.TempDir())
			b.Setenv("XDG_RUNTIME_DIR", b.TempDir())
			home, err := openHome()
			require.NoError(b, err)
			defer home.Close()
			done := make(chan struct{})
			defer close(done)
			for i := range machines {
				host, guest := net.Pipe()
				defer guest.Close()
				q := &quiet{done: done, client: guestagent.NewClient(host, guestagent.Options{})}
				defer q.client.Close()
				go io.Copy(io.Discard, guest) // an agent that says nothing
				ready := make(chan struct{})
				go func() {
					runtime.LockOSThread()
					q.tid = unix.Gettid()
					close(ready)
					<-done
				}()
				<-ready
				d, err := home.Claim(fmt.Sprint("m", i))
				require.NoError(b, err)
				s, err := control.Serve(d, control.Config{Info: control.Info{VCPUs: 1}})
				require.NoError(b, err)
				s.Attach(q)
				defer s.Close()
			}
			cpu := func() time.Duration {
				var ru unix.Rusage
				require.NoError(b, unix.Getrusage(unix.RUSAGE_SELF, &ru))
				return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
			}
			ctx, cancel := context.WithCancel(context.Background())
			ended := make(chan error, 1)
			var out bytes.Buffer
			go func() {
				c := rootCommand()
				c.SetArgs([]string{"sched", "run", "--dry-run"})
				c.SetOut(&out)
				ended <- c.ExecuteContext(ctx)
			}()
			time.Sleep(5 * time.Second) // connections are made, and all are judged
			used, begin := time.Duration(0), time.Now()
			from := cpu()
			for b.Loop() {
				time.Sleep(10 * time.Second)
			}
			used = cpu() - from
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(100*used.Seconds()/time.Since(begin).Seconds(), "%core")
			cancel()
			require.NoError(b, <-ended)
			s, _, err := readStatus()
			require.NoError(b, err)
			require.Len(b, s.Machines, machines)
			for _, m := range s.Machines {
				require.Empty(b, m.Error, m.Machine)
			}
		})
	}
}
