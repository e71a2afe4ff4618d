//go:build linux

package helper

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// Offsets in the reserved region (docs/ports.md).
const (
	regionMagic       = "GDREGION"
	regionVersion     = 1
	offVersion        = 0x08
	offSize           = 0x0c
	offRequestRing    = 0x10
	offEventRing      = 0x18
	offDoorbell       = 0x20
	offRequestHead    = 0x40
	offEventTail      = 0x44
	offRequestTail    = 0x80
	offEventHead      = 0x84
	regionHeader      = 0x100
	regionMax         = 1 << 20
	regionCommandWord = "gondola.region="
)

// region is the carrier: two rings of bytes that are polled as the raw ports are.
type region struct {
	mem              []byte
	requests, events ring
	bell             func() error
	release          func() error
	closed           chan struct{}
	asked            chan struct{} // holds one: a request was sent, so that an event is near
	once             sync.Once
	users            sync.WaitGroup // of the memory

	mu   sync.Mutex
	over bool
}

// ring is one of the rings: whose index is whose depends on its direction.
type ring struct {
	data       []byte
	head, tail *uint32
}

// OpenRegion opens the region that the kernel's command line announces. It needs
// root, /dev/mem and /dev/port. It fails with ErrNoCarrier if none is announced.
func OpenRegion() (Carrier, error) {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	at, size, err := parseRegion(string(cmdline))
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile("/dev/mem", os.O_RDWR|syscall.O_SYNC, 0)
	if err != nil {
		return nil, fmt.Errorf("reserved region: %w", err)
	}
	defer f.Close()
	mem, err := unix.Mmap(int(f.Fd()), int64(at), size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("reserved region: mmap of %d bytes at %#x: %w", size, at, err)
	}
	port, err := os.OpenFile("/dev/port", os.O_WRONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("reserved region: doorbell: %w", errors.Join(err, unix.Munmap(mem)))
	}
	var door int64
	r, err := newRegion(mem, func() error {
		_, err := port.WriteAt([]byte{1}, door)
		return err
	}, func() error { return errors.Join(port.Close(), unix.Munmap(mem)) })
	if err != nil {
		return nil, errors.Join(err, port.Close(), unix.Munmap(mem))
	}
	door = int64(binary.LittleEndian.Uint32(mem[offDoorbell:]))
	if err := r.wipe(); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// parseRegion finds the region on a kernel command line.
func parseRegion(cmdline string) (at uint64, size int, err error) {
	for word := range strings.FieldsSeq(cmdline) {
		v, ok := strings.CutPrefix(word, regionCommandWord)
		if !ok {
			continue
		}
		s, a, ok := strings.Cut(v, "@")
		n, err := strconv.ParseUint(s, 0, 32)
		if err == nil && ok {
			at, err = strconv.ParseUint(a, 0, 63)
		}
		if err != nil || !ok || n < regionHeader || n > regionMax || at%pageSize != 0 {
			return 0, 0, fmt.Errorf("%w: kernel command line: %.80q must be SIZE@ADDRESS", ErrNoCarrier, word)
		}
		return at, int(n), nil
	}
	return 0, 0, fmt.Errorf("%w: no %s on the kernel command line", ErrNoCarrier, regionCommandWord)
}

// newRegion uses memory that has a region's header; bell rings the doorbell, release
// gives back the memory.
func newRegion(mem []byte, bell, release func() error) (*region, error) {
	u32 := func(off int) uint32 { return binary.LittleEndian.Uint32(mem[off:]) }
	if len(mem) < regionHeader || string(mem[:len(regionMagic)]) != regionMagic {
		return nil, fmt.Errorf("%w: reserved region: no header there", ErrNoCarrier)
	}
	if v := u32(offVersion); v != regionVersion {
		return nil, fmt.Errorf("%w: reserved region: version %d is not known here; %d is", ErrNoCarrier, v, regionVersion)
	}
	r := &region{mem: mem, bell: bell, release: release, closed: make(chan struct{}), asked: make(chan struct{}, 1)}
	word := func(off int) *uint32 { return (*uint32)(unsafe.Pointer(&mem[off])) }
	for _, x := range []struct {
		ring       *ring
		at         int
		head, tail int
	}{
		{&r.requests, offRequestRing, offRequestHead, offRequestTail},
		{&r.events, offEventRing, offEventHead, offEventTail},
	} {
		at, n := uint64(u32(x.at)), uint64(u32(x.at+4))
		if n == 0 || n&(n-1) != 0 || at < regionHeader || at+n > uint64(len(mem)) {
			return nil, fmt.Errorf("%w: reserved region: a ring of %d bytes at %#x is not in it", ErrNoCarrier, n, at)
		}
		*x.ring = ring{mem[at : at+n], word(x.head), word(x.tail)}
	}
	return r, nil
}

// wipe completes whatever frame a helper broke off when it was killed. A region that
// nobody used needs none.
func (r *region) wipe() error {
	if atomic.LoadUint32(r.requests.head) == 0 {
		return nil
	}
	return r.Send(make([]byte, proto.HeaderSize+proto.MaxBody))
}

func (r *region) String() string { return Region }

// enter is false if the memory is gone or going.
func (r *region) enter() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.over {
		r.users.Add(1)
	}
	return !r.over
}

// wait waits before the next look, or until asked.
func (r *region) wait(pause *time.Duration, asked <-chan struct{}) error {
	t := time.NewTimer(*pause)
	defer t.Stop()
	select {
	case <-t.C:
		*pause = min(*pause*5/4, pollLast)
		return nil
	case <-asked:
		*pause = pollFirst
		return nil
	case <-r.closed:
		return os.ErrClosed
	}
}

// Send implements Carrier. A frame that fits appears as a whole, so that a helper
// that is killed leaves no half of it.
func (r *region) Send(frame []byte) error {
	if !r.enter() {
		return os.ErrClosed
	}
	defer r.users.Done()
	pause := pollFirst
	for q := &r.requests; len(frame) > 0; {
		select {
		case <-r.closed:
			return os.ErrClosed
		default:
		}
		head, tail := atomic.LoadUint32(q.head), atomic.LoadUint32(q.tail)
		size := uint32(len(q.data))
		used := head - tail
		if used > size {
			return fmt.Errorf("reserved region: the monitor's index %d makes no sense with %d", tail, head)
		}
		n := min(size-used, uint32(len(frame)))
		if n == 0 || n < uint32(len(frame)) && uint32(len(frame)) <= size {
			if err := r.wait(&pause, nil); err != nil {
				return err
			}
			continue
		}
		at := head & (size - 1)
		m := copy(q.data[at:], frame[:n])
		copy(q.data, frame[m:n])
		atomic.StoreUint32(q.head, head+n)
		if err := r.bell(); err != nil {
			return err
		}
		frame, pause = frame[n:], pollFirst
	}
	select {
	case r.asked <- struct{}{}:
	default:
	}
	return nil
}

// Read implements Carrier.
func (r *region) Read(p []byte) (int, error) {
	if !r.enter() {
		return 0, os.ErrClosed
	}
	defer r.users.Done()
	pause := pollFirst
	for q := &r.events; ; {
		head, tail := atomic.LoadUint32(q.head), atomic.LoadUint32(q.tail)
		size := uint32(len(q.data))
		if head-tail > size {
			return 0, fmt.Errorf("reserved region: the monitor's index %d makes no sense with %d", head, tail)
		}
		if n := min(head-tail, uint32(len(p))); n > 0 {
			at := tail & (size - 1)
			m := copy(p[:n], q.data[at:])
			copy(p[m:n], q.data)
			atomic.StoreUint32(q.tail, tail+n)
			return int(n), r.bell()
		}
		if err := r.wait(&pause, r.asked); err != nil {
			return 0, err
		}
	}
}

// Close implements Carrier.
func (r *region) Close() (err error) {
	r.once.Do(func() {
		r.mu.Lock()
		r.over = true
		r.mu.Unlock()
		close(r.closed)
		r.users.Wait()
		err = r.release()
	})
	return err
}
