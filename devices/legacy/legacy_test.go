package legacy

import (
	"bytes"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/bus"
)

type attacher interface{ Attach(Bus) error }

// pc is a machine's I/O ports as a guest uses them.
type pc struct{ *bus.Bus }

func newPC(t testing.TB, devices ...attacher) pc {
	b := bus.NewPorts()
	for _, d := range devices {
		require.NoError(t, d.Attach(b))
	}
	return pc{b}
}

func (p pc) inb(port uint64) byte {
	v := []byte{0}
	p.Read(port, v)
	return v[0]
}

func (p pc) outb(v byte, port uint64) { p.Write(port, []byte{v}) }

type line struct {
	high  bool
	edges int
}

func (l *line) Set(high bool) {
	if high && !l.high {
		l.edges++
	}
	l.high = high
}

func TestAttach(t *testing.T) {
	nothing := func() {}
	devices := []attacher{
		NewI8042(nothing, nil), NewResetPorts(nothing), NewRTC(RTCConfig{Now: time.Now}),
		&POST{}, &DebugPort{}, NewExitPort(func(uint32) {}),
	}
	p := newPC(t, devices...) // no overlap
	for _, d := range devices {
		assert.ErrorIs(t, d.Attach(p), bus.ErrOverlap, "%T", d)
	}
	// Any width and any port: nothing panics, nothing outside 8 bits.
	for port := range uint64(0x100) {
		for _, n := range []int{1, 2, 4, 8} {
			data := bytes.Repeat([]byte{0x5a}, n)
			p.Write(port, data)
			p.Read(port, data)
		}
	}
	for _, d := range []port{{func() byte { return 7 }, func(byte) { t.Fatal("written") }}} {
		data := make([]byte, 4)
		d.Read(0, data)
		assert.Equal(t, []byte{7, 0xff, 0xff, 0xff}, data)
		d.Read(1, data[:1])
		assert.Equal(t, byte(0xff), data[0])
		d.Write(1, data)
		d.Write(0, nil)
		d.Read(0, nil)
	}
}

// command is Linux's i8042_command: parameters out, answers in.
func (p pc) command(t *testing.T, c byte, out []byte, answers int) (in []byte, status byte) {
	t.Helper()
	require.Zero(t, p.inb(0x64)&0x02, "input buffer full")
	p.outb(c, 0x64)
	for _, v := range out {
		p.outb(v, 0x60)
	}
	for range answers {
		status = p.inb(0x64)
		require.NotZero(t, status&statusOBF, "no answer to command %#x", c)
		in = append(in, p.inb(0x60))
	}
	require.Zero(t, p.inb(0x64)&statusOBF)
	return in, status
}

func TestI8042LinuxProbe(t *testing.T) {
	l := &line{}
	p := newPC(t, NewI8042(func() { t.Fatal("reset") }, l))
	require.NotEqual(t, byte(0xff), p.inb(0x64), "there is a controller")
	require.Zero(t, p.inb(0x64)&statusOBF, "nothing to flush")
	require.NotZero(t, p.inb(0x64)&statusUnlock, "no keylock warning")
	ctr, _ := p.command(t, 0x20, nil, 1)
	again, _ := p.command(t, 0x20, nil, 1)
	require.Equal(t, ctr, again)
	p.command(t, 0x60, []byte{ctr[0]&^ctrKeyboardInt | ctrKeyboardOff | ctrAuxOff}, 0)
	edges := l.edges

	v, _ := p.command(t, 0xaa, nil, 1)
	assert.Equal(t, []byte{0x55}, v)
	v, _ = p.command(t, 0xab, nil, 1)
	assert.Equal(t, []byte{0}, v)
	v, status := p.command(t, 0xd3, []byte{0x5a}, 1)
	assert.Equal(t, []byte{0x5a}, v)
	assert.Zero(t, status&0x20, "the echo is not the mouse's: no mouse port")
	v, _ = p.command(t, 0xa9, nil, 1)
	assert.NotContains(t, []byte{0, 0xfa, 0xff}, v[0], "nor by its test")
	assert.Equal(t, edges, l.edges, "no interrupt while it is off")

	// The keyboard's turn, with interrupts.
	p.command(t, 0x60, []byte{ctrKeyboardInt | ctrSYS | ctrAuxOff}, 0)
	p.outb(0xf2, 0x60) // who are you?
	assert.True(t, l.high)
	assert.Equal(t, edges+1, l.edges)
	assert.Equal(t, byte(statusOBF|statusTimeout), p.inb(0x64)&(statusOBF|statusTimeout))
	assert.Equal(t, byte(0xfe), p.inb(0x60))
	assert.False(t, l.high)
	assert.Zero(t, p.inb(0x64)&(statusOBF|statusTimeout))
}

func TestI8042Commands(t *testing.T) {
	for _, tc := range []struct {
		do     []uint16 // writes: port 0x64 if above 0xff
		answer []byte
	}{
		{[]uint16{0x167, 0x99, 0x127}, []byte{0x99}},               // RAM
		{[]uint16{0x160, 0x41, 0x1a7, 0x1ad, 0x120}, []byte{0x71}}, // devices off
		{[]uint16{0x160, 0x71, 0x1a8, 0x1ae, 0x120}, []byte{0x41}}, // and on
		{[]uint16{0x1d1, 0xdd, 0x1d0}, []byte{0xdd}},               // output port, A20 off
		{[]uint16{0x1d1, 0xdf, 0x1d0}, []byte{0xdf}},               // A20 on
		{[]uint16{0x1d0}, []byte{outNoReset | outA20}},
		{[]uint16{0x1d2, 0x12}, []byte{0x12}},
		{[]uint16{0x1d4, 0xff}, []byte{0xfe}},
		{[]uint16{0x1c0}, []byte{0x80}},
		{[]uint16{0x1ff}, nil},
		{[]uint16{0x199}, nil},
		{[]uint16{0x1d1, 0x1d0}, []byte{outNoReset | outA20}}, // a command takes the place of a parameter
		{[]uint16{0x1aa, 0x1ab}, []byte{0}},                   // one byte is kept
	} {
		t.Run(fmt.Sprintf("%x", tc.do), func(t *testing.T) {
			p := newPC(t, NewI8042(func() { t.Fatal("reset") }, nil))
			for _, w := range tc.do {
				if w > 0xff {
					p.outb(byte(w), 0x64)
					assert.NotZero(t, p.inb(0x64)&statusCommand)
				} else {
					p.outb(byte(w), 0x60)
					assert.Zero(t, p.inb(0x64)&statusCommand)
				}
			}
			var got []byte
			for p.inb(0x64)&statusOBF != 0 {
				got = append(got, p.inb(0x60))
			}
			assert.Equal(t, tc.answer, got)
		})
	}
}

func TestReset(t *testing.T) {
	type w struct {
		port uint64
		v    byte
	}
	for _, tc := range []struct {
		name   string
		writes []w
		want   int
	}{
		{"i8042 pulse", []w{{0x64, 0xfe}}, 1},
		{"i8042 pulse, ten times as Linux does", []w{{0x64, 0xfe}, {0x64, 0xfe}, {0x64, 0xfe}, {0x64, 0xfe}, {0x64, 0xfe},
			{0x64, 0xfe}, {0x64, 0xfe}, {0x64, 0xfe}, {0x64, 0xfe}, {0x64, 0xfe}}, 10},
		{"i8042 pulse of other lines", []w{{0x64, 0xff}, {0x64, 0xfd}}, 0},
		{"i8042 pulse of all lines", []w{{0x64, 0xf0}}, 1},
		{"i8042 output port", []w{{0x64, 0xd1}, {0x60, 0xfe}}, 1},
		{"i8042 output port, A20 only", []w{{0x64, 0xd1}, {0x60, 0xdf}}, 0},
		{"0xfe for the keyboard", []w{{0x60, 0xfe}}, 0},
		{"PCI as Linux does", []w{{0xcf9, 0x02}, {0xcf9, 0x06}}, 1},
		{"PCI, full", []w{{0xcf9, 0x0a}, {0xcf9, 0x0e}}, 1},
		{"PCI at once", []w{{0xcf9, 0x06}}, 1},
		{"PCI without the edge", []w{{0xcf9, 0x02}, {0xcf9, 0x0a}}, 0},
		{"PCI, bit left set", []w{{0xcf9, 0x04}, {0xcf9, 0x04}}, 1},
		{"fast", []w{{0x92, 0x01}}, 1},
		{"fast, bit left set", []w{{0x92, 0x03}, {0x92, 0x03}}, 1},
		{"fast, twice", []w{{0x92, 0x03}, {0x92, 0x02}, {0x92, 0x03}}, 2},
		{"fast A20", []w{{0x92, 0x02}, {0x92, 0x00}}, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := 0
			var k *I8042
			k = NewI8042(func() { n++; k.readStatus() }, nil) // no lock is held
			p := newPC(t, k, NewResetPorts(func() { n++ }))
			for _, w := range tc.writes {
				p.outb(w.v, w.port)
			}
			assert.Equal(t, tc.want, n)
		})
	}
	p := newPC(t, NewResetPorts(func() {}))
	assert.Equal(t, byte(portAA20), p.inb(0x92))
	p.outb(0xf0, 0x92)
	assert.Equal(t, byte(0xf0), p.inb(0x92))
	p.outb(0xff, 0xcf9)
	assert.Equal(t, byte(0x0e), p.inb(0xcf9))
}

func TestPOST(t *testing.T) {
	d := &POST{}
	p := newPC(t, d)
	codes, n := d.Codes()
	assert.Empty(t, codes)
	assert.Zero(t, n)
	assert.Zero(t, p.inb(0x80))
	for i := range 200 {
		p.outb(byte(i), 0x80)
		assert.Equal(t, byte(i), p.inb(0x80))
	}
	codes, n = d.Codes()
	assert.EqualValues(t, 200, n)
	require.Len(t, codes, postKept)
	for i, c := range codes {
		assert.Equal(t, byte(200-postKept+i), c)
	}
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for range 1000 {
				p.outb(1, 0x80)
			}
		})
	}
	wg.Wait()
	_, n = d.Codes()
	assert.EqualValues(t, 2200, n)
}

func TestDebugPort(t *testing.T) {
	d := &DebugPort{}
	p := newPC(t, d)
	assert.Equal(t, byte(0xe9), p.inb(0xe9))
	log, n := d.Log()
	assert.Empty(t, log)
	assert.Zero(t, n)
	for _, c := range []byte("hello") {
		p.outb(c, 0xe9)
	}
	log, n = d.Log()
	assert.Equal(t, "hello", string(log))
	assert.EqualValues(t, 5, n)
	all := []byte("hello")
	for i := range 2*debugKept + 77 {
		p.outb(byte(i*7>>2), 0xe9)
		all = append(all, byte(i*7>>2))
		if l := len(all); l >= debugKept-1 && l <= debugKept+1 || l == 2*debugKept {
			log, _ = d.Log()
			assert.True(t, bytes.Equal(all[max(l, debugKept)-debugKept:], log), "after %d bytes", l)
		}
	}
	log, n = d.Log()
	assert.True(t, bytes.Equal(all[len(all)-debugKept:], log))
	assert.EqualValues(t, len(all), n)
}

func TestExitPort(t *testing.T) {
	for _, tc := range []struct {
		addr uint64
		data []byte
		want []uint32
	}{
		{0xf4, []byte{0}, []uint32{0}},
		{0xf4, []byte{42}, []uint32{42}},
		{0xf4, []byte{0x34, 0x12}, []uint32{0x1234}},
		{0xf4, []byte{0x78, 0x56, 0x34, 0x92}, []uint32{0x92345678}},
		{0xf5, []byte{1}, nil},
		{0xf4, []byte{1, 2, 3, 4, 5, 6, 7, 8}, nil}, // no such port access
	} {
		var got []uint32
		p := newPC(t, NewExitPort(func(code uint32) { got = append(got, code) }))
		assert.Zero(t, p.inb(0xf4))
		p.Write(tc.addr, tc.data)
		assert.Equal(t, tc.want, got)
		if len(tc.want) != 0 {
			p.outb(99, 0xf4)
			assert.Equal(t, tc.want, got, "only the first counts")
		}
	}
}
