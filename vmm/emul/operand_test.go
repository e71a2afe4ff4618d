package emul

import "encoding/binary"

// shape is an instruction to be encoded with random operands.
type shape struct {
	enc   encoding
	pfx   []byte // legacy: mandatory and operand size prefixes
	pp    prefix // VEX, EVEX
	opmap uint8
	op    byte
	digit int8 // or any
	w     bool
	ll    uint8
	form  form // formMem or formReg
	imm   int
	vvvv  bool // has a register in vvvv
	kmask bool // EVEX: write mask
	bcast bool // EVEX: broadcast
	kreg  bool // reg is an opmask register
	krm   bool // rm is
	bare  bool // no ModRM

	noZero bool // EVEX: no zeroing

	size  int  // of the memory operand, for disp8*N and room
	align int  // of the memory operand
	gpr   uint // which of reg (1), rm (2), vvvv (4) are general registers
}

// encode makes an instruction. Memory operands lie in the data page; for that
// encode sets the registers of the address.
func (r *rig) encode(s shape) []byte {
	rng := r.rng
	numbers := 16
	if s.enc == evex {
		numbers = 32
	}
	// RSP cannot be an operand of a native instruction.
	pick := func(isGPR bool) uint8 {
		for {
			n := uint8(rng.IntN(numbers))
			if isGPR {
				n &= 15
				if n == 4 {
					continue
				}
			}
			return n
		}
	}
	reg := pick(s.gpr&1 != 0)
	if s.digit != anyValue {
		reg = uint8(s.digit)
	}
	if s.kreg {
		reg &= 7
	}
	rm := pick(s.gpr&2 != 0)
	if s.krm {
		rm &= 7
	}
	v := uint8(0)
	if s.vvvv {
		v = pick(s.gpr&4 != 0)
	}
	var tail []byte // after ModRM
	mod := byte(3)
	index := uint8(0)
	if s.form == formMem {
		var base uint8
		for base = uint8(rng.IntN(16)); base == 4; base = uint8(rng.IntN(16)) {
		}
		sib := base&7 == 4 || rng.IntN(2) == 0
		mod = byte(rng.IntN(3))
		if mod == 0 && base&7 == 5 {
			mod = 1
		}
		var disp int64
		switch mod {
		case 1:
			d := int8(rng.Uint32())
			disp = int64(d)
			tail = []byte{byte(d)}
			if s.enc == evex {
				disp *= int64(s.size)
			}
		case 2:
			d := int32(rng.Uint32())
			disp = int64(d)
			tail = binary.LittleEndian.AppendUint32(nil, uint32(d))
		}
		target := r.va + uint64(rng.IntN(4096-s.size+1))
		if s.align > 1 {
			target &^= uint64(s.align - 1)
		}
		rm = base
		if sib {
			scale := byte(rng.IntN(4))
			for index = uint8(rng.IntN(16)); index == base; index = uint8(rng.IntN(16)) {
			}
			if index != 4 {
				target -= *r.regs.gpr(index) << scale
			}
			tail = append([]byte{scale<<6 | index&7<<3 | base&7}, tail...)
			rm = 4 | base&8
		}
		*r.regs.gpr(base) = target - uint64(disp)
	}
	for range s.imm {
		tail = append(tail, byte(rng.Uint32()))
	}
	modrm := mod<<6 | reg&7<<3 | rm&7
	x := index >> 3 & 1
	if s.form == formReg {
		x = rm >> 4 & 1
	}
	var b []byte
	inv := func(bit, n uint8) uint8 { return (bit&1 ^ 1) << n }
	w := bit(s.w, 7)
	switch s.enc {
	case legacy:
		b = append(b, s.pfx...)
		if rex := bit(s.w, 3) | (reg>>3&1)<<2 | x<<1 | rm>>3&1; rex != 0 || rng.IntN(2) == 0 {
			b = append(b, 0x40|rex)
		}
		switch s.opmap {
		case map0F:
			b = append(b, 0x0f)
		case map0F38:
			b = append(b, 0x0f, 0x38)
		case map0F3A:
			b = append(b, 0x0f, 0x3a)
		}
	case vex:
		if s.opmap == map0F && x == 0 && rm>>3&1 == 0 && !s.w && rng.IntN(2) == 0 {
			b = append(b, 0xc5, inv(reg>>3, 7)|(^v&15)<<3|s.ll<<2|uint8(s.pp))
			break
		}
		b = append(b, 0xc4, inv(reg>>3, 7)|inv(x, 6)|inv(rm>>3, 5)|s.opmap, w|(^v&15)<<3|s.ll<<2|uint8(s.pp))
	case evex:
		var p3 byte = s.ll<<5 | inv(v>>4, 3) | bit(s.bcast, 4)
		if s.kmask {
			p3 |= byte(1 + rng.IntN(7))
			if !s.noZero {
				p3 |= byte(rng.IntN(2)) << 7
			}
		}
		b = append(b, 0x62, inv(reg>>3, 7)|inv(x, 6)|inv(rm>>3, 5)|inv(reg>>4, 4)|s.opmap,
			w|(^v&15)<<3|4|uint8(s.pp), p3)
	}
	if s.bare {
		return append(b, s.op)
	}
	return append(append(b, s.op, modrm), tail...)
}
