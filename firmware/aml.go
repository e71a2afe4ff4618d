package firmware

import (
	"encoding/binary"
	"slices"
)

// A small encoder for ACPI machine language (ACPI 6.5, chapter 20): each
// function returns the bytes of one term.

func amlPkg(op []byte, body ...[]byte) []byte {
	b := slices.Concat(body...)
	return slices.Concat(op, amlPkgLength(len(b)), b)
}

// amlPkgLength encodes the length of a package, which includes its own bytes
// (20.2.4).
func amlPkgLength(n int) []byte {
	if n+1 < 1<<6 {
		return []byte{byte(n + 1)}
	}
	for extra := 1; ; extra++ {
		total := n + 1 + extra
		if extra < 3 && total >= 1<<(4+8*extra) {
			continue
		}
		out := []byte{byte(extra<<6 | total&0xf)}
		for total >>= 4; len(out) <= extra; total >>= 8 {
			out = append(out, byte(total))
		}
		return out
	}
}

func amlInt(v uint64) []byte {
	le := binary.LittleEndian
	switch {
	case v <= 1:
		return []byte{byte(v)}
	case v < 1<<8:
		return []byte{0x0a, byte(v)}
	case v < 1<<16:
		return le.AppendUint16([]byte{0x0b}, uint16(v))
	case v < 1<<32:
		return le.AppendUint32([]byte{0x0c}, uint32(v))
	}
	return le.AppendUint64([]byte{0x0e}, v)
}

func amlString(s string) []byte {
	return slices.Concat([]byte{0x0d}, []byte(s), []byte{0})
}

// amlName names an object in the current scope; name has four characters.
func amlName(name string, value []byte) []byte {
	return slices.Concat([]byte{0x08}, []byte(name), value)
}

func amlPackage(items ...[]byte) []byte {
	return amlPkg([]byte{0x12}, []byte{byte(len(items))}, slices.Concat(items...))
}

func amlBuffer(b []byte) []byte {
	return amlPkg([]byte{0x11}, amlInt(uint64(len(b))), b)
}

func amlDevice(name string, body ...[]byte) []byte {
	return amlPkg([]byte{0x5b, 0x82}, []byte(name), slices.Concat(body...))
}

func amlScope(path string, body ...[]byte) []byte {
	return amlPkg([]byte{0x10}, []byte(path), slices.Concat(body...))
}

// amlMMIOResources is a resource template (6.4) of a 32-bit memory window and
// an edge-triggered, active-high interrupt of its own.
func amlMMIOResources(base, size, gsi uint32) []byte {
	le := binary.LittleEndian
	b := []byte{0x86, 9, 0, 1} // Memory32Fixed, 9 bytes, writable
	b = le.AppendUint32(b, base)
	b = le.AppendUint32(b, size)
	b = append(b, 0x89, 6, 0, 1<<1|1, 1) // extended interrupt, 6 bytes, edge and consumer, one
	b = le.AppendUint32(b, gsi)
	return amlBuffer(append(b, 0x79, 0)) // end tag, checksum not used
}
