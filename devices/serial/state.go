package serial

import "github.com/gondola-vmm/gondola/devices"

var _ devices.Stateful = (*UART)(nil)

const stateVersion = 1

// saved is the state of a UART.
type saved struct {
	Regs      []byte `cbor:"1,keyasint"` // IER, FCR, LCR, MCR, SCR, DLL, DLM
	LSRErrors byte   `cbor:"2,keyasint,omitempty"`
	MSRDelta  byte   `cbor:"3,keyasint,omitempty"`
	Empty     bool   `cbor:"4,keyasint,omitempty"`
	THRI      bool   `cbor:"5,keyasint,omitempty"`
	Polls     uint8  `cbor:"6,keyasint,omitempty"`
	Polled    bool   `cbor:"7,keyasint,omitempty"`
	In        []byte `cbor:"8,keyasint,omitempty"`  // fed, not yet read
	Loop      []byte `cbor:"9,keyasint,omitempty"`  // looped back, not yet read
	Out       []byte `cbor:"10,keyasint,omitempty"` // sent, not yet given to Output
}

// SaveState implements devices.Stateful. What was sent and is still on its way to
// Output is in it, too: the process that saves goes on and writes it, and so does
// one that starts from the state.
func (u *UART) SaveState() (devices.State, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := &u.s
	return devices.EncodeState(stateVersion, saved{
		Regs:      []byte{s.ier, s.fcr, s.lcr, s.mcr, s.scr, s.dll, s.dlm},
		LSRErrors: s.lsrErrors, MSRDelta: s.msrDelta, Empty: s.empty, THRI: s.thri,
		Polls: uint8(s.polls), Polled: s.polled, In: s.in.bytes(), Loop: s.loop.bytes(), Out: u.out.bytes(),
	})
}

// LoadState implements devices.Stateful.
//
// Output that was on its way in the state is written only by a UART that has not
// been used yet: any other is that of the process that saved it or of a later
// time, and has written it. A transmitter that was busy becomes empty, with its
// interrupt, as soon as this UART's queue has room (lessons.md: Firecracker #5764).
func (u *UART) LoadState(st devices.State) (func(), error) {
	var v saved
	if err := devices.DecodeState(st, stateVersion, &v); err != nil {
		return nil, err
	}
	switch {
	case len(v.Regs) != 7:
		return nil, devices.BadState("%d registers, there are 7", len(v.Regs))
	case len(v.In) > inSize, len(v.Loop) > fifoSize, len(v.Out) > outSize:
		return nil, devices.BadState("queues of %d, %d and %d bytes, they have at most %d, %d and %d", len(v.In), len(v.Loop), len(v.Out), inSize, fifoSize, outSize)
	case v.Polls > 2 || v.MSRDelta > 0xf || v.LSRErrors&^lsrOE != 0:
		return nil, devices.BadState("registers have bits that do not exist")
	}
	return func() { u.load(&v) }, nil
}

func (u *UART) load(v *saved) {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := state{
		ier: v.Regs[0] & (ierRDI | ierTHRI | ierRLSI | ierMSI), fcr: v.Regs[1] & fcrStored, lcr: v.Regs[2],
		mcr: v.Regs[3] & (mcrDTR | mcrRTS | mcrOut1 | mcrOut2 | mcrLoop), scr: v.Regs[4], dll: v.Regs[5], dlm: v.Regs[6],
		lsrErrors: v.LSRErrors, msrDelta: v.MSRDelta, thri: v.THRI, polls: int(v.Polls), polled: v.Polled,
		in: u.s.in, loop: u.s.loop, irq: u.s.irq,
	}
	s.in.fill(v.In)
	s.loop.fill(v.Loop)
	if !u.used && u.w != nil {
		u.out.fill(v.Out)
	}
	u.used = true
	s.empty = u.closed || u.w == nil || u.out.room() >= emptyRoom
	if s.empty && !v.Empty {
		s.thri = true
	}
	u.s = s
	// A polling vCPU of before does not wait for what its successor has; the
	// line is set whatever it was.
	poke(u.thre)
	u.s.irq = u.s.interrupt() != iirNone && !u.closed
	if u.line != nil {
		u.line.Set(u.s.irq)
	}
	u.inRoom.Broadcast()
	u.idle = u.idle && u.out.n == 0
	u.wake.Broadcast()
}
