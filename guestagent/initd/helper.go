//go:build linux

package initd

import (
	"time"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/guestagent/vmstate/wire"
)

// keepHelper serves the helper's socket (S5.1). The helper itself is started when
// somebody connects, so that a guest which has no use for it does not pay for a
// process, and again when it has ended: the socket stays, so that those who connect
// in between wait for the next one.
func (d *initd) keepHelper() {
	const first, last = 100 * time.Millisecond, 10 * time.Second
	server, err := wire.Serve(wire.Socket)
	if err != nil {
		logf("helper: %v", err)
		return
	}
	pause := first
	for {
		if err := server.Wait(); err != nil {
			logf("helper: %v", err)
			return
		}
		if d.ending.Load() {
			return
		}
		begin := time.Now()
		if err := d.runHelper(server); err != nil {
			logf("helper: %v", err)
		}
		if time.Since(begin) > last {
			pause = first
		}
		time.Sleep(pause)
		pause = min(2*pause, last)
	}
}

// runHelper runs the helper with the socket as its standard input until it ends.
func (d *initd) runHelper(server *wire.Server) error {
	fd, err := server.Fd()
	if err != nil {
		return err
	}
	_, end, err := d.agent.Spawn(&proto.Exec{Args: []string{"/proc/self/exe", "helper", "--fd", "0"}, Dir: "/"}, [3]int{fd, 1, 2})
	if err != nil {
		return err
	}
	if ws := <-end; ws.Signaled() {
		logf("helper: ended by a signal: %v", ws.Signal())
	}
	return nil
}
