package serial

import (
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// driver8250 drives a UART as Linux's 8250 driver does: an edge-triggered
// interrupt, a handler that reads IIR until nothing is pending, transmission in
// bursts of a FIFO whenever the transmitter is empty, and a console that masks
// interrupts and polls in between.
type driver8250 struct {
	u    *UART
	irq  chan struct{} // an edge is latched
	port sync.Mutex    // the driver's port lock
	xmit []byte
	room *sync.Cond
	got  func(byte)
}

func newDriver(got func(byte)) (*driver8250, *line) {
	d := &driver8250{irq: make(chan struct{}, 1), got: got}
	d.room = sync.NewCond(&d.port)
	return d, &line{rise: func() { poke(d.irq) }}
}

func (d *driver8250) startup(trigger byte) {
	u := d.u
	u.outb(regIIR, fcrEnable)
	u.outb(regIIR, fcrEnable|fcrClearRx|4)
	u.outb(regIIR, 0)
	for range 2 {
		u.in(regLSR)
		u.in(regData)
		u.in(regIIR)
		u.in(regMSR)
	}
	u.outb(regLCR, 0x03)
	u.outb(regMCR, mcrOut2)
	u.outb(regIIR, fcrEnable|trigger)
	u.outb(regMCR, mcrOut2|mcrRTS|mcrDTR)
	u.outb(regIER, ierRLSI|ierRDI)
}

// interrupt is serial8250_interrupt.
func (d *driver8250) interrupt(t *testing.T) {
	d.port.Lock()
	defer d.port.Unlock()
	for d.u.in(regIIR)&iirNone == 0 {
		lsr := d.u.in(regLSR)
		for n := 0; lsr&lsrDR != 0 && n < 256; n++ {
			assert.Zero(t, lsr&lsrOE, "overrun")
			d.got(d.u.in(regData))
			lsr = d.u.in(regLSR)
		}
		d.u.in(regMSR)
		if lsr&lsrTHRE != 0 && d.u.in(regIER)&ierTHRI != 0 {
			for range fifoSize {
				if len(d.xmit) == 0 {
					break
				}
				d.u.outb(regData, d.xmit[0])
				d.xmit = d.xmit[1:]
			}
			if len(d.xmit) == 0 {
				d.u.outb(regIER, d.u.in(regIER)&^ierTHRI)
			}
			d.room.Signal()
		}
	}
}

// write is a process writing to the terminal.
func (d *driver8250) write(p []byte) {
	d.port.Lock()
	defer d.port.Unlock()
	for len(p) > 0 {
		for len(d.xmit) >= 4096 {
			d.room.Wait()
		}
		n := min(len(p), 4096-len(d.xmit))
		d.xmit = append(d.xmit, p[:n]...)
		p = p[n:]
		if ier := d.u.in(regIER); ier&ierTHRI == 0 {
			d.u.outb(regIER, ier|ierTHRI)
		}
	}
}

// console is the kernel's own output, serial8250_console_write.
func (d *driver8250) console(p []byte) {
	d.port.Lock()
	defer d.port.Unlock()
	ier := d.u.in(regIER)
	d.u.outb(regIER, 0)
	wait := func() {
		for d.u.in(regLSR)&(lsrTEMT|lsrTHRE) != lsrTEMT|lsrTHRE {
		}
	}
	for _, c := range p {
		wait()
		d.u.outb(regData, c)
	}
	wait()
	d.u.outb(regIER, ier)
}

// pieces calls f with all of p in pieces of random size.
func pieces(r *rand.Rand, p []byte, most int, f func([]byte)) {
	for len(p) > 0 {
		n := min(len(p), 1+r.IntN(most))
		f(p[:n])
		p = p[n:]
	}
}

// Under load both ways, with a slow terminal, kernel messages in between and input
// from before the driver started, no byte is lost, doubled or out of order.
func TestLinuxDriverUnderLoad(t *testing.T) {
	for seed := range uint64(4) {
		trigger := byte(seed) << 6
		r := rand.New(rand.NewPCG(seed, 16550))
		random := func(n int, tag byte) []byte { // output is tagged by its source
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(r.Uint32())&0x7f | tag
			}
			return p
		}
		output, messages, input := random(300_000, 0), random(5_000, 0x80), random(50_000, 0)
		var got []byte
		received := make(chan struct{})
		d, l := newDriver(func(c byte) {
			if got = append(got, c); len(got) == len(input) {
				close(received)
			}
		})
		terminal, tty := io.Pipe()
		u := New(Config{Line: l, Output: tty})
		d.u = u
		ctx := watchdog(t)
		stop := make(chan struct{})

		var host, guest sync.WaitGroup
		seeds := [3]uint64{r.Uint64(), r.Uint64(), r.Uint64()}
		var seen []byte
		host.Go(func() {
			r := rand.New(rand.NewPCG(seeds[0], 1))
			for {
				buf := make([]byte, 1+r.IntN(3000))
				n, err := terminal.Read(buf)
				seen = append(seen, buf[:n]...)
				if err != nil {
					return
				}
			}
		})
		early := len(input) / 1000 // before anybody listens
		_, err := u.Feed(input[:early])
		require.NoError(t, err)
		host.Go(func() {
			pieces(rand.New(rand.NewPCG(seeds[1], 2)), input[early:], 700, func(p []byte) {
				_, err := u.Feed(p)
				assert.NoError(t, err)
			})
		})

		d.startup(trigger)
		var isr sync.WaitGroup
		isr.Go(func() {
			for {
				select {
				case <-d.irq:
					d.interrupt(t)
				case <-stop:
					return
				}
			}
		})
		guest.Go(func() { pieces(rand.New(rand.NewPCG(seeds[2], 3)), output, 5000, d.write) })
		guest.Go(func() { pieces(rand.New(rand.NewPCG(seeds[2], 4)), messages, 80, d.console) })

		finished := make(chan struct{})
		go func() {
			guest.Wait()
			<-received
			close(finished)
		}()
		select {
		case <-finished:
		case <-ctx.Done():
			t.Fatalf("seed %d: stuck: %d of %d bytes received; %+v", seed, len(got), len(input), u.s)
		}
		d.port.Lock() // what is left goes out by interrupts
		for len(d.xmit) > 0 && ctx.Err() == nil {
			d.room.Wait()
		}
		d.port.Unlock()
		require.NoError(t, u.Drain(ctx))
		close(stop)
		isr.Wait()
		assert.Zero(t, u.Dropped())
		require.NoError(t, u.Close())
		require.NoError(t, tty.Close())
		host.Wait()

		var user, kernel []byte
		for _, c := range seen {
			if c&0x80 != 0 {
				kernel = append(kernel, c)
			} else {
				user = append(user, c)
			}
		}
		assert.True(t, string(user) == string(output), "seed %d: %d of %d bytes of output", seed, len(user), len(output))
		assert.True(t, string(kernel) == string(messages), "seed %d: %d of %d bytes of messages", seed, len(kernel), len(messages))
		assert.True(t, string(got) == string(input), "seed %d: %d of %d bytes of input", seed, len(got), len(input))
	}
}
