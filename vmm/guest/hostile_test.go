package guest_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/devices/virtio"
	"github.com/gondola-vmm/gondola/devices/virtio/console"
	"github.com/gondola-vmm/gondola/devices/virtio/rng"
	"github.com/gondola-vmm/gondola/firmware"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/vmmtest"
	"github.com/gondola-vmm/gondola/vmm/vmmtest/needkvm"
)

// A script of stores is what the hostile guest executes: pairs of a 32-bit address
// and value. After each store it loads from the same address. A pair of zeros ends
// the machine through the exit port.
var player = firmware.Flat{Addr: playerAddr, Mode: firmware.Protected, Image: firmware.Bytes([]byte{
	0xbe, 0x00, 0x00, 0x40, 0x00, // mov esi, scriptAddr
	0x8b, 0x3e, // again: mov edi, [esi]
	0x8b, 0x46, 0x04, // mov eax, [esi+4]
	0x85, 0xff, // test edi, edi
	0x74, 0x09, // jz end
	0x89, 0x07, // mov [edi], eax
	0x8b, 0x0f, // mov ecx, [edi]
	0x83, 0xc6, 0x08, // add esi, 8
	0xeb, 0xee, // jmp again
	0xb0, 42, // end: mov al, 42
	0xe6, 0xf4, // out 0xf4, al
	0xeb, 0xfe,
})}

const (
	playerAddr = 0x300000 // out of the reach of what the devices write
	scriptAddr = 0x400000
	garbageAt  = 0x20000 // rings and buffers, up to garbageEnd
	garbageEnd = 0x80000
	hostileRAM = 8 << 20

	queues    = 6
	queueSize = 16
	ringAt    = 0x30000 // 0x1000 for each queue of each device: descriptors, available and used ring
	availAt   = 0x400
	usedAt    = 0x800
	buffersAt = 0x60000 // 16 bytes each
	buffers   = 1024
	readyAt   = buffersAt + buffers*16 // VIRTIO_CONSOLE_DEVICE_READY
)

// hostile writes scripts for a machine with devices at bases.
type hostile struct {
	*rand.Rand
	bases  []uint32
	script []byte
	avail  map[uint32]uint32 // index of the available ring at that address
}

func (h *hostile) store(addr, value uint32) {
	h.script = binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(h.script, addr), value)
}

func (h *hostile) pick(vs ...uint32) uint32 { return vs[h.IntN(len(vs))] }

func (h *hostile) oneIn(n int) bool { return h.IntN(n) == 0 }

// value is something that a device may stumble over.
func (h *hostile) value() uint32 {
	switch h.IntN(4) {
	case 0:
		return uint32(h.IntN(8))
	case 1:
		return h.pick(0xffffffff, 0x80000000, 0x7fffffff, 0xffff, 0x8000, 0x10000, 32768)
	case 2:
		return uint32(garbageAt + h.IntN(garbageEnd-garbageAt))
	}
	return h.Uint32() | 1<<28 // not in RAM: the player has to live
}

// mostly is v, or once in n something else.
func (h *hostile) mostly(v uint32, n int) uint32 {
	if h.oneIn(n) {
		return h.value()
	}
	return v
}

func ring(dev, q int) uint32 { return ringAt + uint32(dev*queues+q)<<12 }

// setUp brings a device to where it works on rings, as a driver does, except that
// now and then something is wrong.
func (h *hostile) setUp(dev int) {
	reg := func(r, v uint32) { h.store(h.bases[dev]+r, h.mostly(v, 100)) }
	h.store(h.bases[dev]+virtio.RegStatus, 0)
	reg(virtio.RegStatus, 3) // ACKNOWLEDGE, DRIVER
	reg(virtio.RegDriverFeaturesSel, 0)
	reg(virtio.RegDriverFeatures, h.pick(0, 1, 2, 3)*uint32(dev&1)|h.pick(0, 1, 2, 3)<<28) // SIZE, MULTIPORT; INDIRECT_DESC, EVENT_IDX
	reg(virtio.RegDriverFeaturesSel, 1)
	reg(virtio.RegDriverFeatures, 1) // VERSION_1
	reg(virtio.RegStatus, 11)        // FEATURES_OK
	for q := range queues {
		at := ring(dev, q)
		reg(virtio.RegQueueSel, uint32(q))
		reg(virtio.RegQueueNum, queueSize)
		for _, r := range [][2]uint32{{virtio.RegQueueDescLow, at}, {virtio.RegQueueDriverLow, at + availAt}, {virtio.RegQueueDeviceLow, at + usedAt}} {
			reg(r[0], r[1])
			reg(r[0]+4, 0)
		}
		reg(virtio.RegQueueReady, 1)
		h.store(at+availAt, 0)
		h.avail[at] = 0
	}
	reg(virtio.RegStatus, 15) // DRIVER_OK
	// What makes a console talk: buffers for its control messages, and the
	// word that the driver is ready.
	for i := range uint32(8) {
		h.chain(dev, 2, i, descriptor{buffersAt + i*64, 64, 2})
	}
	h.chain(dev, 3, 0, descriptor{readyAt, 8, 0})
}

type descriptor struct{ addr, size, flags uint32 }

// chain gives a queue descriptors from head on.
func (h *hostile) chain(dev, q int, head uint32, ds ...descriptor) {
	at := ring(dev, q)
	for i, d := range ds {
		n := (head + uint32(i)) % queueSize
		h.store(at+n*16, h.mostly(d.addr, 30))
		h.store(at+n*16+4, h.mostly(0, 60))
		h.store(at+n*16+8, h.mostly(d.size, 30))
		h.store(at+n*16+12, h.mostly(d.flags, 30)&0xffff|(n+1)%queueSize<<16)
	}
	n := h.avail[at]
	h.store(at+availAt+4+n%queueSize*2, h.mostly(head, 60)) // and 0 into the next entry
	h.avail[at] = n + 1
	h.store(at+availAt, h.mostly((n+1)&0xffff, 60)<<16)
	h.store(h.bases[dev]+virtio.RegQueueNotify, h.mostly(uint32(q), 30))
}

// offer gives a queue a chain of anything.
func (h *hostile) offer(dev, q int) {
	ds := make([]descriptor, 1+h.IntN(4))
	for i := range ds {
		ds[i] = descriptor{
			buffersAt + uint32(h.IntN(buffers))*16,
			h.pick(8, 8, 16, 64, 4096),
			h.pick(0, 1, 1, 2, 2, 3, 4, 6), // NEXT, WRITE, INDIRECT
		}
	}
	h.chain(dev, q, uint32(h.IntN(queueSize)), ds...)
}

// play makes a script of n hostile deeds.
func (h *hostile) play(n int) {
	h.store(readyAt, 0)
	h.store(readyAt+4, 1<<16)
	for i := range buffers { // control messages of the console, most of them
		at := uint32(buffersAt + i*16)
		h.store(at, h.mostly(uint32(h.IntN(4)), 20))
		h.store(at+4, h.mostly(uint32(h.IntN(9))|uint32(h.IntN(2))<<16, 20))
	}
	for dev := range h.bases {
		h.setUp(dev)
	}
	for range n {
		dev := h.IntN(len(h.bases))
		switch h.IntN(32) {
		case 0:
			h.setUp(dev)
		case 1: // any register, at any alignment
			h.store(h.bases[dev]+uint32(h.IntN(virtio.WindowSize)), h.value())
		case 2:
			h.store(h.bases[dev]+h.pick(virtio.RegQueueSel, virtio.RegQueueNum, virtio.RegQueueReady, virtio.RegInterruptACK, virtio.RegConfig), h.value())
		case 3: // any place of the rings
			h.store(ring(dev, h.IntN(queues))+uint32(h.IntN(0xa00)), h.value())
		default:
			h.offer(dev, h.IntN(queues))
		}
	}
	h.store(0, 0)
}

// A guest that writes garbage to every virtio register and every ring has itself
// to blame: the machine goes on, memory stays bounded, and the host can end it.
func TestHostileVirtio(t *testing.T) {
	needkvm.Test(t)
	for seed := range uint64(8) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			base := uint32(firmware.MMIOBase)
			h := &hostile{Rand: rand.New(rand.NewPCG(seed, 1)), bases: []uint32{base, base + virtio.WindowSize}, avail: map[uint32]uint32{}}
			before := usage(t)
			con, err := console.New(console.Config{Console: true, Ports: []string{"a", "b"}})
			require.NoError(t, err)
			vm, err := vmm.New(vmm.Config{Memory: hostileRAM, Boot: player, Devices: []vmm.Device{
				vmm.Virtio{Name: "rng", Device: rng.New(rng.Config{})},
				vmm.Virtio{Name: "console", Device: con},
			}})
			require.NoError(t, err)
			defer vm.Close()

			h.play(3000)
			require.NoError(t, vm.Memory().WriteAt(h.script, scriptAddr))
			garbage := make([]byte, garbageEnd-garbageAt)
			for i := 0; i < len(garbage); i += 4 {
				binary.LittleEndian.PutUint32(garbage[i:], h.value())
			}
			require.NoError(t, vm.Memory().WriteAt(garbage, garbageAt))

			// The host uses its ports meanwhile.
			var wg sync.WaitGroup
			for _, name := range []string{console.ConsoleName, "a", "b"} {
				p, err := con.Open(name)
				require.NoError(t, err)
				wg.Go(func() {
					for {
						if _, err := io.Copy(io.Discard, struct{ io.Reader }{p}); err != nil {
							return
						}
					}
				})
				wg.Go(func() {
					for {
						if _, err := p.Write(make([]byte, 4096)); err != nil {
							return
						}
					}
				})
			}
			exit := vm.Run(vmmtest.Context(t))
			assert.Equal(t, vmm.Exited, exit.Reason, "%v", exit)
			assert.Equal(t, uint32(42), exit.Code)
			assert.Less(t, usage(t).rss, before.rss+hostileRAM+16<<20)
			begin := time.Now()
			require.NoError(t, vm.Close())
			wg.Wait()
			assert.Less(t, time.Since(begin), 10*time.Second)
			after := usage(t)
			assert.LessOrEqual(t, after.files, before.files, "descriptors")
			assert.LessOrEqual(t, after.goroutines, before.goroutines+1, "goroutines")
		})
	}
}
