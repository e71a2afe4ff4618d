package legacy

import (
	"sync"
	"time"

	"github.com/gondola-vmm/gondola/devices"
)

// CMOS addresses. What is not named is storage.
const (
	cmosSeconds = 0x00
	cmosMinutes = 0x02
	cmosHours   = 0x04
	cmosWeekday = 0x06
	cmosDay     = 0x07
	cmosMonth   = 0x08
	cmosYear    = 0x09
	cmosA       = 0x0a
	cmosB       = 0x0b
	cmosC       = 0x0c
	cmosD       = 0x0d

	cmosEquipment = 0x14
	cmosBase      = 0x15 // KiB below 640 KiB, two bytes
	cmosExtended  = 0x17 // KiB from 1 MiB, two bytes
	cmosExtended2 = 0x30 // the same
	cmosCentury   = 0x32
	cmosAbove16M  = 0x34 // 64 KiB units, two bytes
	cmosAbove4G   = 0x5b // 64 KiB units, three bytes
)

const (
	aUIP      = 1 << 7 // update in progress
	aDefault  = 0x26   // 32 kHz, 1024 Hz
	b24Hours  = 1 << 1
	bBinary   = 1 << 2
	bUpdate   = 1 << 4 // interrupt enable
	bSet      = 1 << 7 // the clock stands still
	cUpdate   = 1 << 4
	cIRQ      = 1 << 7
	dValid    = 1 << 7
	hourPM    = 1 << 7
	cmosIndex = 0x7f // of port 0x70; the bit above masks NMIs
)

// updateTime is how long before a new second UIP is set: the 244 µs of warning and
// the 1984 µs that the chip is busy for.
const updateTime = 2228 * time.Microsecond

// RTCConfig is what a clock shows when it is new.
type RTCConfig struct {
	// Now is the host's time; the guest sees it in UTC.
	Now func() time.Time
	// Low and High are the bytes of RAM below and above 4 GiB.
	Low, High uint64
}

// RTC is an MC146818 clock with 128 bytes of CMOS memory at ports 0x70 and 0x71.
//
// It counts the seconds of Now, from where the guest sets it; BCD and binary, 12
// and 24 hours are as the guest chooses (BCD and 24 hours at first). It has no
// interrupt: Linux reads the clock at boot by polling UIP, and its alarm, update
// and periodic interrupts serve only programs that open /dev/rtc. The alarm bytes
// are storage; the update flag of register C works for who polls it. The NMI mask
// has no effect, there being no NMI. The day of the week follows from the date.
type RTC struct {
	now func() time.Time

	mu sync.Mutex
	s  rtcState
}

type rtcState struct {
	index byte
	// cmos holds the time as well while bSet is on.
	cmos [128]byte
	// offset is what the guest's clock is ahead of Now, in seconds.
	offset int64
	// seen is the second of the guest's time at which register C was read.
	seen int64
}

// NewRTC makes a clock.
func NewRTC(c RTCConfig) *RTC {
	r := &RTC{now: c.Now}
	m := &r.s.cmos
	m[cmosA] = aDefault
	m[cmosB] = b24Hours
	m[cmosD] = dValid
	m[cmosEquipment] = 1 << 1 // a coprocessor
	put := func(at, n int, v uint64) {
		for i := range n {
			m[at+i] = byte(min(v, 1<<(8*n)-1) >> (8 * i))
		}
	}
	const kib, mib = 1 << 10, 1 << 20
	put(cmosBase, 2, 640)
	above := func(limit uint64) uint64 { return max(c.Low, limit) - limit }
	put(cmosExtended, 2, above(1*mib)/kib)
	put(cmosExtended2, 2, above(1*mib)/kib)
	put(cmosAbove16M, 2, above(16*mib)/(64*kib))
	put(cmosAbove4G, 3, c.High/(64*kib))
	r.s.seen = r.time().Unix()
	return r
}

var _ devices.Handler = (*RTC)(nil)

// Attach registers the ports.
func (r *RTC) Attach(b Bus) error { return b.Register(0x70, 2, "RTC", r) }

// Read implements devices.Handler.
func (r *RTC) Read(offset uint64, data []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range data {
		data[i] = 0xff // the index can only be written
		if offset+uint64(i) == 1 {
			data[i] = r.read(r.s.index)
		}
	}
}

// Write implements devices.Handler.
func (r *RTC) Write(offset uint64, data []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, v := range data {
		switch offset + uint64(i) {
		case 0:
			r.s.index = v & cmosIndex
		case 1:
			r.write(r.s.index, v)
		}
	}
}

// time is what the guest's clock shows if it runs.
func (r *RTC) time() time.Time {
	t := r.now()
	return time.Unix(t.Unix()+r.s.offset, int64(t.Nanosecond())).UTC()
}

func (r *RTC) read(reg byte) byte {
	s := &r.s
	running := s.cmos[cmosB]&bSet == 0
	switch reg {
	case cmosSeconds, cmosMinutes, cmosHours, cmosWeekday, cmosDay, cmosMonth, cmosYear, cmosCentury:
		if running {
			r.latch()
		}
	case cmosA:
		if running && time.Duration(r.time().Nanosecond()) >= time.Second-updateTime {
			return s.cmos[cmosA] | aUIP
		}
	case cmosC:
		now := r.time().Unix()
		if !running || now == s.seen {
			return 0
		}
		s.seen = now
		if s.cmos[cmosB]&bUpdate != 0 {
			return cUpdate | cIRQ
		}
		return cUpdate
	}
	return s.cmos[reg]
}

func (r *RTC) write(reg, v byte) {
	s := &r.s
	running := s.cmos[cmosB]&bSet == 0
	switch reg {
	case cmosSeconds, cmosMinutes, cmosHours, cmosDay, cmosMonth, cmosYear, cmosCentury:
		if !running {
			s.cmos[reg] = v
			return
		}
		r.latch()
		s.cmos[reg] = v
		r.set()
	case cmosA:
		s.cmos[cmosA] = v &^ aUIP
	case cmosB:
		if running {
			r.latch()
		}
		s.cmos[cmosB] = v
		if !running && v&bSet == 0 {
			r.set()
		}
	case cmosC, cmosD, cmosWeekday:
	default:
		s.cmos[reg] = v
	}
}

// latch writes the running time to the registers.
func (r *RTC) latch() {
	m := &r.s.cmos
	t := r.time()
	year, month, day := t.Date()
	hour, minute, second := t.Clock()
	var pm byte
	if m[cmosB]&b24Hours == 0 {
		if hour >= 12 {
			pm = hourPM
		}
		hour = (hour+11)%12 + 1
	}
	m[cmosSeconds] = r.encode(second)
	m[cmosMinutes] = r.encode(minute)
	m[cmosHours] = r.encode(hour) | pm
	m[cmosWeekday] = r.encode(int(t.Weekday()) + 1)
	m[cmosDay] = r.encode(day)
	m[cmosMonth] = r.encode(int(month))
	m[cmosYear] = r.encode(year % 100)
	m[cmosCentury] = r.encode(year / 100)
}

// set makes the clock go on from what the registers say. Nonsense is carried over
// (the 40th of a month is in the next) and never refused.
func (r *RTC) set() {
	m := &r.s.cmos
	hour := r.decode(m[cmosHours])
	if m[cmosB]&b24Hours == 0 {
		hour = r.decode(m[cmosHours]&^hourPM) % 12
		if m[cmosHours]&hourPM != 0 {
			hour += 12
		}
	}
	t := time.Date(r.decode(m[cmosCentury])*100+r.decode(m[cmosYear]), time.Month(r.decode(m[cmosMonth])),
		r.decode(m[cmosDay]), hour, r.decode(m[cmosMinutes]), r.decode(m[cmosSeconds]), 0, time.UTC)
	r.s.offset = t.Unix() - r.now().Unix()
	r.s.seen = t.Unix()
}

// encode is a number from 0 to 99 as register B wants it.
func (r *RTC) encode(v int) byte {
	if r.s.cmos[cmosB]&bBinary != 0 {
		return byte(v)
	}
	return byte(v/10%10<<4 | v%10)
}

func (r *RTC) decode(v byte) int {
	if r.s.cmos[cmosB]&bBinary != 0 {
		return int(v)
	}
	return int(v>>4)*10 + int(v&0xf)
}
