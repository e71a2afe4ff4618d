package legacy

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func newClock(t testing.TB, at string) (*clock, pc) {
	when, err := time.Parse(time.RFC3339Nano, at)
	require.NoError(t, err)
	c := &clock{when}
	return c, newPC(t, NewRTC(RTCConfig{Now: c.now, Low: 128 * mib}))
}

func (p pc) cmos(reg byte) byte {
	p.outb(reg, 0x70)
	return p.inb(0x71)
}

func (p pc) setCMOS(reg, v byte) {
	p.outb(reg, 0x70)
	p.outb(v, 0x71)
}

func (p pc) cmosN(regs ...byte) (v []byte) {
	for _, r := range regs {
		v = append(v, p.cmos(r))
	}
	return v
}

var timeRegs = []byte{cmosSeconds, cmosMinutes, cmosHours, cmosWeekday, cmosDay, cmosMonth, cmosYear, cmosCentury}

func TestRTCFormats(t *testing.T) {
	for _, tc := range []struct {
		at   string
		b    byte
		want []byte // as timeRegs
	}{
		{"2024-02-29T23:59:58Z", b24Hours, []byte{0x58, 0x59, 0x23, 5, 0x29, 0x02, 0x24, 0x20}},
		{"2024-02-29T23:59:58Z", b24Hours | bBinary, []byte{58, 59, 23, 5, 29, 2, 24, 20}},
		{"2024-02-29T23:59:58Z", 0, []byte{0x58, 0x59, 0x91, 5, 0x29, 0x02, 0x24, 0x20}},
		{"2024-02-29T23:59:58Z", bBinary, []byte{58, 59, 0x80 | 11, 5, 29, 2, 24, 20}},
		{"1999-12-31T00:00:00Z", 0, []byte{0x00, 0x00, 0x12, 6, 0x31, 0x12, 0x99, 0x19}},
		{"2000-01-02T12:30:09Z", 0, []byte{0x09, 0x30, 0x92, 1, 0x02, 0x01, 0x00, 0x20}},
		{"2000-01-01T01:00:00+02:00", b24Hours, []byte{0x00, 0x00, 0x23, 6, 0x31, 0x12, 0x99, 0x19}}, // UTC
	} {
		t.Run(fmt.Sprintf("%s/%#x", tc.at, tc.b), func(t *testing.T) {
			_, p := newClock(t, tc.at)
			assert.Equal(t, byte(b24Hours), p.cmos(cmosB), "BCD and 24 hours at first")
			p.setCMOS(cmosB, tc.b)
			assert.Equal(t, tc.want, p.cmosN(timeRegs...))
		})
	}
}

// The clock is read back in each format as it was set, with and without SET, and
// goes on from there.
func TestRTCSet(t *testing.T) {
	for _, b := range []byte{0, b24Hours, bBinary, b24Hours | bBinary} {
		for hour := range 24 {
			for _, halt := range []bool{false, true} {
				host, p := newClock(t, "2031-07-15T10:20:30.25Z")
				want := time.Date(1987, 6, 5, hour, 43, 21, 0, time.UTC)
				src := &clock{want}
				q := newPC(t, NewRTC(RTCConfig{Now: src.now}))
				q.setCMOS(cmosB, b)
				p.setCMOS(cmosB, b)
				if halt {
					p.setCMOS(cmosB, b|bSet)
					host.t = host.t.Add(time.Hour)
					assert.Zero(t, p.cmos(cmosA)&aUIP)
				}
				for _, r := range timeRegs {
					p.setCMOS(r, q.cmos(r))
				}
				if halt {
					host.t = host.t.Add(time.Hour)
					assert.Equal(t, q.cmos(cmosHours), p.cmos(cmosHours), "it stands still")
					p.setCMOS(cmosB, b)
				}
				assert.Equal(t, q.cmosN(timeRegs...), p.cmosN(timeRegs...), "B %#x, %d h, SET %v", b, hour, halt)
				step := 49*time.Hour + 61*time.Second
				host.t, src.t = host.t.Add(step), src.t.Add(step)
				assert.Equal(t, q.cmosN(timeRegs...), p.cmosN(timeRegs...), "later")
			}
		}
	}
}

// What a guest writes that is no time becomes some time.
func FuzzRTC(f *testing.F) {
	f.Add([]byte{0x0b, 0x82, 0x09, 0xff, 0x08, 0xff, 0x32, 0xff, 0x0b, 0x02, 0x00, 0x00})
	f.Add([]byte{0x08, 0, 0x07, 0, 0x32, 0, 0x09, 0, 0x04, 0xff})
	f.Add([]byte{0x0b, 0x00, 0x04, 0x80, 0x0b, 0x86, 0x04, 0xff, 0x0b, 0x06})
	f.Fuzz(func(t *testing.T, ops []byte) {
		host, p := newClock(t, "2024-02-29T23:59:58.999Z")
		for ops = ops[:min(len(ops), 100)]; len(ops) >= 2; ops = ops[2:] {
			p.setCMOS(ops[0], ops[1])
			host.t = host.t.Add(time.Duration(ops[1]) * 100 * time.Millisecond)
			for r := range byte(128) {
				p.cmos(r)
			}
		}
		// A driver that sets the clock properly afterwards has a clock.
		p.setCMOS(cmosB, bSet|b24Hours)
		for i, v := range []byte{0x21, 0x43, 0x19, 0, 0x15, 0x10, 0x26, 0x20} {
			p.setCMOS(timeRegs[i], v)
		}
		p.setCMOS(cmosB, b24Hours)
		host.t = host.t.Add(time.Minute)
		for i, v := range []byte{0x21, 0x44, 0x19, 5, 0x15, 0x10, 0x26, 0x20} {
			if got := p.cmos(timeRegs[i]); got != v {
				t.Fatalf("register %#x is %#x, not %#x", timeRegs[i], got, v)
			}
		}
	})
}

// UIP says so before the time changes, early enough to read all of it.
func TestRTCUpdateInProgress(t *testing.T) {
	host, p := newClock(t, "2024-12-31T23:59:59Z")
	start := host.t
	for us := range 2_000_000 / 50 {
		host.t = start.Add(time.Duration(us*50) * time.Microsecond)
		left := time.Second - host.t.Sub(start)%time.Second
		uip := p.cmos(cmosA)
		assert.Equal(t, byte(aDefault), uip&^aUIP)
		if (uip&aUIP != 0) != (left <= updateTime) {
			t.Fatalf("UIP %v %v before the second", uip&aUIP != 0, left)
		}
	}
	host.t = start.Add(-updateTime - time.Microsecond)
	require.Zero(t, p.cmos(cmosA)&aUIP)
	first := p.cmosN(timeRegs...)
	host.t = host.t.Add(244 * time.Microsecond) // what the chip guarantees
	assert.Equal(t, first, p.cmosN(timeRegs...))
}

func TestRTCStatusRegisters(t *testing.T) {
	host, p := newClock(t, "2024-05-06T07:08:09.5Z")
	assert.Equal(t, byte(dValid), p.cmos(cmosD))
	p.setCMOS(cmosD, 0)
	assert.Equal(t, byte(dValid), p.cmos(cmosD), "read-only")
	p.setCMOS(cmosC, 0xff)
	assert.Zero(t, p.cmos(cmosC))
	host.t = host.t.Add(time.Second)
	assert.Equal(t, byte(cUpdate), p.cmos(cmosC))
	assert.Zero(t, p.cmos(cmosC), "reading clears it")
	p.setCMOS(cmosB, b24Hours|bUpdate)
	host.t = host.t.Add(time.Second)
	assert.Equal(t, byte(cUpdate|cIRQ), p.cmos(cmosC))
	p.setCMOS(cmosA, 0xff)
	assert.Equal(t, byte(0x7f), p.cmos(cmosA), "UIP is read-only")
	p.setCMOS(cmosWeekday, 1)
	assert.Equal(t, byte(2), p.cmos(cmosWeekday), "a Monday stays one")

	assert.Equal(t, byte(0xff), p.inb(0x70), "the index can only be written")
	for _, r := range []byte{0x01, 0x03, 0x05, 0x0f, 0x7f} { // alarm, shutdown status, storage
		p.setCMOS(r|0x80, r^0x5a) // the NMI mask is no part of the index
		assert.Equal(t, r^0x5a, p.cmos(r))
		assert.Equal(t, r^0x5a, p.cmos(r|0x80))
	}
	p.Write(0x70, []byte{0x0f, 0x0a}) // index and value at once
	assert.Equal(t, byte(0x0a), p.cmos(0x0f))
	two := []byte{0, 0}
	p.Read(0x70, two)
	assert.Equal(t, []byte{0xff, 0x0a}, two)
}

func TestRTCMemorySize(t *testing.T) {
	for _, tc := range []struct {
		low, high                 uint64
		extended, above16, above4 uint64
	}{
		{1 * mib, 0, 0, 0, 0},
		{8 * mib, 0, 7 << 10, 0, 0},
		{16 * mib, 0, 15 << 10, 0, 0},
		{16*mib + 64<<10, 0, 15<<10 + 64, 1, 0},
		{128 * mib, 0, 0xffff, 112 * 16, 0},
		{3 * gib, 1 * gib, 0xffff, (3*gib - 16*mib) >> 16, 1 << 14},
		{4 * gib, 61 * gib, 0xffff, 0xff00, 61 << 14},
		{3 * gib, 1 << 40, 0xffff, (3*gib - 16*mib) >> 16, 0xffffff},
	} {
		p := newPC(t, NewRTC(RTCConfig{Now: time.Now, Low: tc.low, High: tc.high}))
		get := func(regs ...byte) (v uint64) {
			for i, b := range p.cmosN(regs...) {
				v |= uint64(b) << (8 * i)
			}
			return v
		}
		name := fmt.Sprintf("%d+%d MiB", tc.low/mib, tc.high/mib)
		assert.EqualValues(t, 640, get(0x15, 0x16), name)
		assert.Equal(t, tc.extended, get(0x17, 0x18), name)
		assert.Equal(t, tc.extended, get(0x30, 0x31), name)
		assert.Equal(t, tc.above16, get(0x34, 0x35), name)
		assert.Equal(t, tc.above4, get(0x5b, 0x5c, 0x5d), name)
	}
}

func TestNoAllocations(t *testing.T) {
	p := newPC(t, NewRTC(RTCConfig{Now: time.Now}), NewI8042(func() {}, nil), &POST{})
	b := []byte{0}
	assert.Zero(t, testing.AllocsPerRun(100, func() {
		p.Write(0x70, b)
		p.Read(0x71, b)
		p.Read(0x64, b)
		p.Write(0x80, b)
	}))
}
