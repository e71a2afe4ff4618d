package serial

import (
	"bytes"
	"context"
	"errors"
	"io"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// line counts rising edges.
type line struct {
	mu    sync.Mutex
	high  bool
	edges int
	rise  func()
}

func (l *line) Set(high bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if high && !l.high {
		l.edges++
		if l.rise != nil {
			l.rise()
		}
	}
	l.high = high
}

func (l *line) state() (bool, int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.high, l.edges
}

func newUART(t testing.TB, c Config) *UART {
	u := New(c)
	t.Cleanup(func() { assert.NoError(t, u.Close()) })
	return u
}

func (u *UART) in(r uint64) byte {
	var b [1]byte
	u.Read(r, b[:])
	return b[0]
}

func (u *UART) outb(r uint64, v byte) { u.Write(r, []byte{v}) }

func watchdog(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// syncBuffer is an Output that can be read.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// stuck is an Output that blocks until it is let go.
type stuck struct {
	syncBuffer
	entered chan struct{} // a Write has begun
	gate    chan struct{}
}

func newStuck() *stuck { return &stuck{entered: make(chan struct{}, 1000), gate: make(chan struct{})} }

func (s *stuck) Write(p []byte) (int, error) {
	s.entered <- struct{}{}
	<-s.gate
	return s.syncBuffer.Write(p)
}

func TestReset(t *testing.T) {
	u := newUART(t, Config{})
	for r, want := range []byte{0, 0, iirNone, 0, 0, lsrTHRE | lsrTEMT, msrCTS | msrDSR | msrDCD, 0} {
		assert.Equal(t, want, u.in(uint64(r)), "register %d", r)
	}
}

func TestRegistersKeepTheirBits(t *testing.T) {
	u := newUART(t, Config{})
	for v := range 256 {
		v := byte(v)
		u.outb(regSCR, v)
		assert.Equal(t, v, u.in(regSCR))
		u.outb(regIER, v)
		assert.Equal(t, v&0x0f, u.in(regIER), "IER has no upper half (no XScale UUE bit)")
		u.outb(regMCR, v)
		assert.Equal(t, v&0x1f, u.in(regMCR))
		u.outb(regLCR, v)
		assert.Equal(t, v, u.in(regLCR))
		u.outb(regLCR, lcrDLAB)
		u.outb(regData, v)
		u.outb(regIER, ^v)
		assert.Equal(t, []byte{v, ^v}, []byte{u.in(regData), u.in(regIER)})
		u.outb(regLCR, 0x03)
		assert.Equal(t, v&0x0f, u.in(regIER), "the divisor is apart")
	}
}

func TestWideAndStrangeAccesses(t *testing.T) {
	var out syncBuffer
	u := newUART(t, Config{Output: &out})
	u.Write(regSCR, []byte{0x5a})
	u.Write(regLCR, []byte{0x03, 0x0b}) // LCR and MCR
	got := make([]byte, 2)
	u.Read(regLCR, got)
	assert.Equal(t, []byte{0x03, 0x0b}, got)
	four := make([]byte, 4)
	u.Read(regMSR, four)
	assert.Equal(t, []byte{0xb0, 0x5a, 0xff, 0xff}, four, "nothing behind the last register")
	u.Write(regSCR, []byte{1, 2, 3, 4})
	assert.Equal(t, byte(1), u.in(regSCR))
	for _, off := range []uint64{8, 1 << 40, ^uint64(0)} {
		u.Read(off, four[:1])
		assert.Equal(t, byte(0xff), four[0])
		u.Write(off, []byte{0})
	}
	u.Write(0, nil)
	u.Read(0, nil)
	require.NoError(t, u.Drain(watchdog(t)))
	assert.Empty(t, out.String())
}

// The tests of Linux's 8250 driver (autoconfig, autoconfig_16550a, the startup
// tests for broken transmitters), which decide what port it believes to see.
func TestLinuxProbe(t *testing.T) {
	u := newUART(t, Config{})
	for _, v := range []byte{0x00, 0x0f} {
		u.outb(regIER, v)
		require.Equal(t, v, u.in(regIER)&0x0f)
	}
	u.outb(regIER, 0)

	u.outb(regMCR, mcrLoop|mcrOut2|mcrRTS)
	require.Equal(t, byte(msrDCD|msrCTS), u.in(regMSR)&0xf0, "loopback test")
	u.outb(regMCR, 0)

	u.outb(regLCR, 0xbf)
	u.outb(regIIR, 0)
	u.outb(regLCR, 0)
	u.outb(regIIR, fcrEnable)
	require.Equal(t, byte(3), u.in(regIIR)>>6, "16550A")
	for _, lcr := range []byte{0x80, 0xbf} {
		u.outb(regLCR, lcr)
		require.NotZero(t, u.in(regIIR), "no EFR: not a 16650")
	}
	u.outb(regLCR, 0)
	mcr := u.in(regMCR)
	u.outb(regLCR, 0xe0)
	before := u.in(regIIR)
	u.outb(regLCR, 0)
	u.outb(regMCR, mcr^mcrLoop)
	u.outb(regLCR, 0xe0)
	after := u.in(regIIR)
	u.outb(regLCR, 0)
	u.outb(regMCR, mcr)
	require.Zero(t, (before^after)&mcrLoop, "not a National Semiconductor chip")
	u.outb(regIIR, fcrEnable|0x20)
	require.Equal(t, byte(6), u.in(regIIR)>>5, "no 64-byte FIFO")
	u.outb(regLCR, 0x80)
	u.outb(regIIR, fcrEnable|0x20)
	require.Equal(t, byte(6), u.in(regIIR)>>5, "not a 16750")
	u.outb(regLCR, 0)
	u.outb(regIER, 0x40)
	require.Zero(t, u.in(regIER), "not an XScale")
	u.outb(regIER, 0)

	// size_fifo: bytes in loopback until the receiver is full.
	u.outb(regIIR, fcrEnable|fcrClearRx|4)
	u.outb(regMCR, mcrLoop)
	for v := range 256 {
		u.outb(regData, byte(v))
	}
	for v := range fifoSize {
		require.NotZero(t, u.in(regLSR)&lsrDR)
		require.Equal(t, byte(v), u.in(regData))
	}
	require.Zero(t, u.in(regLSR)&lsrDR)
	u.outb(regMCR, 0)

	for range 2 {
		u.outb(regIER, ierTHRI)
		require.Equal(t, byte(lsrTEMT), u.in(regLSR)&lsrTEMT)
		require.Equal(t, byte(iirFIFO|iirTHRI), u.in(regIIR), "no TXEN bug, no THRE bug")
		require.Equal(t, byte(iirFIFO|iirNone), u.in(regIIR), "reading clears it")
		u.outb(regIER, 0)
	}
}

func TestInterruptPriority(t *testing.T) {
	l := &line{}
	u := newUART(t, Config{Line: l})
	u.outb(regIIR, fcrEnable|0x80) // trigger level 8
	u.outb(regMCR, mcrLoop)
	u.in(regMSR)
	for v := range fifoSize + 1 { // one too many
		u.outb(regData, byte(v))
	}
	u.outb(regMCR, mcrLoop|mcrRTS)
	high, _ := l.state()
	assert.False(t, high, "all masked")
	u.outb(regIER, 0x0f)
	level := func() bool { h, _ := l.state(); return h }

	assert.Equal(t, byte(iirFIFO|iirRLSI), u.in(regIIR))
	assert.Equal(t, byte(lsrOE|lsrDR|lsrTHRE|lsrTEMT), u.in(regLSR))
	for i := range fifoSize {
		want := byte(iirRDI)
		if i > 8 {
			want = iirTime
		}
		assert.Equal(t, iirFIFO|want, u.in(regIIR), "%d bytes left", fifoSize-i)
		assert.Equal(t, byte(i), u.in(regData))
		assert.True(t, level())
	}
	assert.Equal(t, byte(iirFIFO|iirTHRI), u.in(regIIR))
	assert.Equal(t, byte(iirFIFO|iirMSI), u.in(regIIR))
	assert.True(t, level())
	assert.Equal(t, byte(msrCTS|0x01), u.in(regMSR))
	assert.Equal(t, byte(msrCTS), u.in(regMSR), "the delta is cleared")
	assert.Equal(t, byte(iirFIFO|iirNone), u.in(regIIR))
	assert.False(t, level())
}

func TestModemStatus(t *testing.T) {
	u := newUART(t, Config{})
	for _, tc := range []struct{ mcr, msr byte }{
		{mcrLoop, 0x0b}, // from CTS, DSR, DCD to nothing
		{mcrLoop | mcrDTR, msrDSR | 0x02},
		{mcrLoop | mcrDTR | mcrOut1, msrDSR | msrRI}, // the rise of RI is not noted
		{mcrLoop | mcrOut2, msrDCD | 0x0e},           // TERI, DDSR, DDCD
		{mcrLoop | mcrOut2 | mcrRTS, msrDCD | msrCTS | 0x01},
		{mcrOut2 | mcrRTS, msrDCD | msrCTS | msrDSR | 0x02},
		{0, msrDCD | msrCTS | msrDSR},
	} {
		u.outb(regMCR, tc.mcr)
		assert.Equal(t, tc.msr, u.in(regMSR), "MCR %#x", tc.mcr)
	}
}

func TestPolledOutput(t *testing.T) {
	var out syncBuffer
	l := &line{}
	u := newUART(t, Config{Line: l, Output: &out})
	const text = "early console\r\n"
	for _, c := range []byte(text) {
		require.Equal(t, byte(lsrTHRE|lsrTEMT), u.in(regLSR)&(lsrTHRE|lsrTEMT))
		u.outb(regData, c)
	}
	require.NoError(t, u.Drain(watchdog(t)))
	assert.Equal(t, text, out.String())
	_, edges := l.state()
	assert.Zero(t, edges)
}

// Bytes come without any Drain.
func TestOutputArrives(t *testing.T) {
	r, w := io.Pipe()
	u := newUART(t, Config{Output: w})
	for _, s := range []string{"a", "bc", "d"} {
		u.Write(regData, []byte{s[0]})
		got := make([]byte, 1)
		_, err := io.ReadFull(r, got)
		require.NoError(t, err)
		assert.Equal(t, s[:1], string(got))
	}
}

func TestPolledInput(t *testing.T) {
	u := newUART(t, Config{})
	u.outb(regMCR, 0)
	u.outb(regIER, 0)
	const text = "typed before anybody listens; longer than a FIFO"
	_, err := io.WriteString(u.Input(), text)
	require.NoError(t, err)
	// A driver that starts clears what it finds.
	for range 3 {
		u.outb(regIIR, fcrEnable|fcrClearRx)
		u.in(regLSR)
		u.in(regData)
		u.in(regIIR)
		u.in(regMSR)
	}
	var got []byte
	for misses := 0; misses < 3; {
		if u.in(regLSR)&lsrDR == 0 {
			misses++
			continue
		}
		got = append(got, u.in(regData))
	}
	assert.Equal(t, text, string(got))
}

// A driver that takes over from one that polled finds an empty receiver until it
// says that it listens.
func TestInputIsWithdrawn(t *testing.T) {
	for name, takeOver := range map[string]func(*UART){
		"IER":           func(u *UART) { u.outb(regIER, 0) },
		"MCR":           func(u *UART) { u.outb(regMCR, mcrOut2) },
		"FIFO cleared":  func(u *UART) { u.outb(regIIR, fcrEnable|fcrClearRx) },
		"FIFO disabled": func(u *UART) { u.outb(regIIR, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			u := newUART(t, Config{})
			u.outb(regIIR, fcrEnable)
			_, err := u.Feed([]byte("input"))
			require.NoError(t, err)
			u.in(regLSR)
			require.Equal(t, byte(lsrDR), u.in(regLSR)&lsrDR, "polled")
			takeOver(u)
			assert.Zero(t, u.in(regLSR)&lsrDR)
			assert.Zero(t, u.in(regData))
			u.outb(regIER, ierRDI)
			for _, c := range []byte("input") {
				assert.Equal(t, c, u.in(regData))
			}
		})
	}
}

func TestInputWithoutFIFO(t *testing.T) {
	l := &line{}
	u := newUART(t, Config{Line: l})
	_, err := u.Feed([]byte("ab"))
	require.NoError(t, err)
	high, _ := l.state()
	assert.False(t, high)
	u.outb(regIER, ierRDI)
	assert.Equal(t, byte(iirRDI), u.in(regIIR))
	assert.Equal(t, byte('a'), u.in(regData))
	assert.Equal(t, byte(iirRDI), u.in(regIIR))
	assert.Equal(t, byte('b'), u.in(regData))
	assert.Equal(t, byte(iirNone), u.in(regIIR))
	high, edges := l.state()
	assert.False(t, high)
	assert.Equal(t, 1, edges)
}

func TestLoopbackIsApart(t *testing.T) {
	var out syncBuffer
	u := newUART(t, Config{Output: &out})
	_, err := u.Feed([]byte("host"))
	require.NoError(t, err)
	u.outb(regIER, ierRDI)
	u.outb(regIIR, fcrEnable)
	u.outb(regMCR, mcrLoop)
	assert.Zero(t, u.in(regLSR)&lsrDR, "the line is disconnected")
	u.outb(regData, 'x')
	assert.Equal(t, byte('x'), u.in(regData))
	u.outb(regMCR, 0)
	for _, c := range []byte("host") {
		assert.Equal(t, c, u.in(regData))
	}
	require.NoError(t, u.Drain(watchdog(t)))
	assert.Empty(t, out.String())
}

// fill sends until the transmitter is busy.
func fill(t *testing.T, u *UART) (sent []byte) {
	t.Helper()
	for u.in(regLSR)&lsrTHRE != 0 {
		for range fifoSize {
			v := byte(len(sent) * 7 >> 3)
			u.outb(regData, v)
			sent = append(sent, v)
		}
		require.LessOrEqual(t, len(sent), outSize, "a flood is bounded")
	}
	return sent
}

// lessons.md: "UART stuck for ever": a transmitter that was busy tells when it is
// not any more, and nothing is lost on the way.
func TestBusyTransmitterRecovers(t *testing.T) {
	l := &line{}
	out := newStuck()
	u := newUART(t, Config{Line: l, Output: out})
	u.outb(regIIR, fcrEnable)
	u.outb(regIER, ierTHRI)
	sent := fill(t, u)
	assert.Greater(t, len(sent), outSize-2*fifoSize)
	assert.Equal(t, byte(iirFIFO|iirNone), u.in(regIIR), "busy: nothing to say")
	high, before := l.state()
	assert.False(t, high)
	assert.Zero(t, u.Dropped())

	risen := make(chan struct{}, 1)
	l.mu.Lock()
	l.rise = func() { poke(risen) }
	l.mu.Unlock()
	close(out.gate)
	select {
	case <-risen:
	case <-watchdog(t).Done():
		t.Fatal("no interrupt after the output went on")
	}
	_, after := l.state()
	assert.Equal(t, before+1, after)
	assert.Equal(t, byte(iirFIFO|iirTHRI), u.in(regIIR))
	assert.Equal(t, byte(lsrTHRE|lsrTEMT), u.in(regLSR)&(lsrTHRE|lsrTEMT))
	require.NoError(t, u.Drain(watchdog(t)))
	assert.True(t, out.String() == string(sent))
}

// A guest that does not ask whether it may send loses its own bytes, and they are
// counted; a vCPU that asks is held a little and let go at once when it may.
func TestFlood(t *testing.T) {
	out := newStuck()
	u := newUART(t, Config{Output: out})
	sent := fill(t, u)
	for range 100000 {
		u.outb(regData, 0xee)
	}
	extra := outSize - len(sent)
	assert.EqualValues(t, 100000-extra, u.Dropped())

	for range 5 { // held, but for a bounded time
		assert.Zero(t, u.in(regLSR)&lsrTHRE)
	}
	polling := make(chan struct{})
	go func() {
		defer close(polling)
		for u.in(regLSR)&lsrTHRE == 0 {
		}
	}()
	close(out.gate)
	select {
	case <-polling:
	case <-watchdog(t).Done():
		t.Fatal("poll never ended")
	}
	require.NoError(t, u.Drain(watchdog(t)))
	assert.True(t, out.String() == string(sent)+string(bytes.Repeat([]byte{0xee}, extra)))
}

type failing struct{ calls atomic.Int32 }

var errBroken = errors.New("broken pipe")

func (f *failing) Write(p []byte) (int, error) {
	f.calls.Add(1)
	return len(p) / 2, errBroken
}

type short struct{}

func (short) Write(p []byte) (int, error) { return len(p) - 1, nil }

// An Output that fails does not stop the guest.
func TestOutputFails(t *testing.T) {
	f := &failing{}
	u := newUART(t, Config{Output: f})
	u.outb(regData, 'x')
	assert.ErrorIs(t, u.Drain(watchdog(t)), errBroken)
	for range 2 * outSize {
		u.outb(regData, 'y')
	}
	assert.NotZero(t, u.in(regLSR)&lsrTHRE)
	assert.ErrorIs(t, u.Drain(watchdog(t)), errBroken)
	assert.EqualValues(t, 1, f.calls.Load())
	assert.Zero(t, u.Dropped())

	u = newUART(t, Config{Output: short{}})
	u.outb(regData, 'x')
	assert.ErrorIs(t, u.Drain(watchdog(t)), io.ErrShortWrite)
}

func TestClose(t *testing.T) {
	l := &line{}
	out := newStuck()
	u := New(Config{Line: l, Output: out})
	u.outb(regIER, ierRDI|ierTHRI)
	fill(t, u)

	fed, drained := make(chan error, 1), make(chan error, 1)
	go func() { n, err := u.Feed(make([]byte, 10*inSize)); assert.Less(t, n, 10*inSize); fed <- err }()
	go func() { drained <- u.Drain(context.Background()) }()
	<-out.entered
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	assert.ErrorIs(t, u.Drain(ctx), context.Canceled)
	require.NoError(t, u.Close())
	require.NoError(t, u.Close(), "idempotent")
	for name, c := range map[string]chan error{"Feed": fed, "Drain": drained} {
		select {
		case err := <-c:
			assert.ErrorIs(t, err, ErrClosed, name)
		case <-watchdog(t).Done():
			t.Fatal(name, "is stuck")
		}
	}
	high, _ := l.state()
	assert.False(t, high)
	_, err := u.Feed([]byte("x"))
	assert.ErrorIs(t, err, ErrClosed)
	for range 100 { // a vCPU may still be there
		u.outb(regData, 'x')
		u.outb(regIER, 0x0f)
		assert.NotZero(t, u.in(regLSR)&lsrTHRE)
	}
	high, _ = l.state()
	assert.False(t, high)
	close(out.gate)
	ctx = watchdog(t)
	for stacks := make([]byte, 1<<20); bytes.Contains(stacks[:runtime.Stack(stacks, true)], []byte("transmit")); {
		require.NoError(t, ctx.Err(), "the goroutine does not end")
		runtime.Gosched()
	}
}

func TestNoAllocations(t *testing.T) {
	u := newUART(t, Config{Output: io.Discard, Line: &line{}})
	u.outb(regIIR, fcrEnable)
	data := make([]byte, 1)
	_, err := u.Feed(make([]byte, inSize))
	require.NoError(t, err)
	assert.Zero(t, testing.AllocsPerRun(1000, func() {
		u.Read(regLSR, data)
		u.Read(regIIR, data)
		u.Read(regData, data)
		u.Write(regIER, []byte{0x0f})
		u.Write(regData, data)
		u.Write(regIER, []byte{0})
	}))
}

// Any sequence of accesses: no panic, the interrupt output is what IIR says, and
// the registers are those of a 16550A.
func FuzzRegisters(f *testing.F) {
	f.Add([]byte{0x81, 0x0f, 0x80, 'x', 0x02, 0, 0x05, 0})
	f.Add([]byte{0x84, 0x1a, 0x80, 1, 0x80, 2, 0x06, 0, 0x00, 0, 0x84, 0})
	f.Add([]byte{0x82, 0xc7, 0x10, 20, 0x81, 5, 0x05, 0, 0x00, 0, 0x02, 0})
	f.Add([]byte{0x83, 0x80, 0x80, 1, 0x81, 0, 0x83, 3, 0x07, 0, 0x87, 9})
	f.Fuzz(func(t *testing.T, ops []byte) {
		l := &line{}
		u := New(Config{Line: l, Output: io.Discard})
		defer u.Close()
		fed := 0
		for ; len(ops) >= 2; ops = ops[2:] {
			op, v := ops[0], ops[1]
			switch {
			case op&0x80 != 0:
				u.Write(uint64(op&0x0f), bytes.Repeat([]byte{v}, 1+int(op>>4&7)))
			case op&0x10 != 0:
				if n := int(v) % 32; fed+n <= inSize { // never blocks
					fed += n
					if _, err := u.Feed(make([]byte, n)); err != nil {
						t.Fatal(err)
					}
				}
			default:
				u.Read(uint64(op&0x0f), make([]byte, 1+int(op>>5)))
			}
			u.mu.Lock()
			id, irq, n, depth := u.s.interrupt(), u.s.irq, u.s.received(), u.s.depth()
			if high, _ := l.state(); high != irq || irq != (id != iirNone) {
				t.Fatalf("line %v, output %v, IIR %#x", high, irq, id)
			}
			if n < 0 || n > depth || u.s.loop.n > fifoSize || u.s.in.n > inSize {
				t.Fatalf("%d bytes received of %d", n, depth)
			}
			if u.s.ier&0xf0 != 0 || u.s.mcr&0xe0 != 0 || u.s.msrDelta&0xf0 != 0 {
				t.Fatalf("IER %#x MCR %#x MSR %#x", u.s.ier, u.s.mcr, u.s.msrDelta)
			}
			u.mu.Unlock()
		}
	})
}

func BenchmarkSend(b *testing.B) {
	u := newUART(b, Config{Output: io.Discard})
	b.ReportAllocs()
	data := []byte{'x'}
	for b.Loop() {
		u.Write(regData, data)
	}
}

func BenchmarkReadLSR(b *testing.B) {
	u := newUART(b, Config{})
	b.ReportAllocs()
	data := []byte{0}
	for b.Loop() {
		u.Read(regLSR, data)
	}
}
