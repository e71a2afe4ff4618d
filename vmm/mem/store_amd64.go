package mem

// store16 stores v at p atomically and with a full barrier.
//
//go:noescape
func store16(p *uint16, v uint16)
