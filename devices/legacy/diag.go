package legacy

import (
	"sync"
	"sync/atomic"
)

// postKept is how many POST codes are kept.
const postKept = 64

// POST is the diagnostic port 0x80: it keeps the latest codes. Linux also writes to
// it to pass time, from any processor, so it takes no lock.
type POST struct {
	count atomic.Uint64
	codes [postKept]atomic.Uint32
}

// Attach registers the port.
func (p *POST) Attach(b Bus) error { return b.Register(0x80, 1, "POST", port{p.last, p.put}) }

func (p *POST) put(v byte) { p.codes[(p.count.Add(1)-1)%postKept].Store(uint32(v)) }

func (p *POST) last() byte {
	n := p.count.Load()
	if n == 0 {
		return 0
	}
	return byte(p.codes[(n-1)%postKept].Load())
}

// Codes returns the latest codes, at most 64, oldest first, and how many there have
// been in all.
func (p *POST) Codes() (latest []byte, count uint64) {
	count = p.count.Load()
	for i := count - min(count, postKept); i < count; i++ {
		latest = append(latest, byte(p.codes[i%postKept].Load()))
	}
	return latest, count
}

// debugKept is how much of the debug port's output is kept, in bytes.
const debugKept = 64 << 10

// DebugPort is the debug port of Bochs, 0xe9: what is written to it is a log, and
// reading 0xe9 from it says that it is there. It keeps the latest 64 KiB.
type DebugPort struct {
	mu    sync.Mutex
	log   []byte
	count uint64
}

// Attach registers the port.
func (d *DebugPort) Attach(b Bus) error {
	return b.Register(0xe9, 1, "debug port", port{func() byte { return 0xe9 }, d.put})
}

func (d *DebugPort) put(v byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.log == nil {
		d.log = make([]byte, debugKept)
	}
	d.log[d.count%debugKept] = v
	d.count++
}

// Log returns the latest output, at most 64 KiB, and how many bytes there have been
// in all.
func (d *DebugPort) Log() (latest []byte, count uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.count <= debugKept {
		return append(latest, d.log[:d.count]...), d.count
	}
	at := d.count % debugKept
	return append(append(latest, d.log[at:]...), d.log[:at]...), d.count
}

// ExitPortBase is the I/O port of ExitPort.
const ExitPortBase = 0xf4

// ExitPort ends a test guest: a write of 1, 2 or 4 bytes to port 0xf4 is the exit
// code. Unlike QEMU's isa-debug-exit, the code is passed on as it is. Only the
// first write counts.
type ExitPort struct {
	exit func(code uint32)
	done atomic.Bool
}

// NewExitPort makes the port; exit is called once.
func NewExitPort(exit func(code uint32)) *ExitPort { return &ExitPort{exit: exit} }

// Attach registers the ports.
func (e *ExitPort) Attach(b Bus) error { return b.Register(ExitPortBase, 4, "exit port", e) }

// Read implements devices.Handler.
func (e *ExitPort) Read(_ uint64, data []byte) { clear(data) }

// Write implements devices.Handler.
func (e *ExitPort) Write(offset uint64, data []byte) {
	if offset != 0 || len(data) == 0 || e.done.Swap(true) {
		return
	}
	var code uint32
	for i, v := range data[:min(len(data), 4)] {
		code |= uint32(v) << (8 * i)
	}
	e.exit(code)
}
