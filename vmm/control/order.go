package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm"
)

// OpOrder changes what work orders change of a machine's allocations (S4.7), or puts
// them back: OrderRequest → Orders. The machine's process remembers what was before, so
// that it does not matter who asks, nor whether they live on.
const OpOrder = "machine.order"

// Bounds of OrderRequest.CPU, in percent of the machine's configured part.
const (
	MinCPUPart   = 25
	MaxCPUPart   = 400
	UsualCPUPart = 100
)

// orderPause is how long a machine may stand still for an order.
const orderPause = 100 * time.Millisecond

// OrderRequest is a work order; what is zero stays.
type OrderRequest struct {
	// CPU is the machine's part of processor time, in percent of what its shares
	// give it: MinCPUPart to MaxCPUPart.
	CPU uint64 `cbor:"1,keyasint,omitempty"`
	// Memory is the balloon's target, in bytes.
	Memory uint64 `cbor:"2,keyasint,omitempty"`
	// Undo puts back all that orders have changed, before anything else.
	Undo bool `cbor:"3,keyasint,omitempty"`
}

// Orders is what orders have made of a machine.
type Orders struct {
	CPU uint64 `cbor:"1,keyasint" json:"cpu_percent"` // UsualCPUPart: as configured
	// Unenforced is why the priority of the vCPUs' threads is not as CPU says; the
	// scheduler may give them that part all the same (gondola sched run).
	Unenforced string `cbor:"2,keyasint,omitempty" json:"unenforced,omitempty"`
	// MemoryBefore is the balloon's target before the first order; 0: none.
	MemoryBefore uint64 `cbor:"3,keyasint,omitempty" json:"memory_before_bytes,omitempty"`
	// Paused is for how long the machine stood still for the last order, in ns.
	Paused int64 `cbor:"4,keyasint,omitempty" json:"paused_ns,omitempty"`
}

// Weighted is implemented by a Machine whose part of the processors can be changed by
// its own process.
type Weighted interface {
	// SetCPUPart gives all vCPUs a part in percent of the usual, or none of them.
	// The machine stands still meanwhile: a vCPU that others wait for must not have
	// less than they.
	SetCPUPart(percent int) error
}

// order performs OpOrder.
func (s *Server) order(c *proto.Call, req *OrderRequest) (any, error) {
	if req.CPU != 0 && (req.CPU < MinCPUPart || req.CPU > MaxCPUPart) {
		return nil, badRequest(fmt.Errorf("a part of %d %%: want %d to %d", req.CPU, MinCPUPart, MaxCPUPart))
	}
	m, err := s.running(c)
	if err != nil {
		return nil, err
	}
	// One after the other, and not while the machine is being paused.
	select {
	case s.pausing <- struct{}{}:
	case <-c.Cancelled():
		return nil, context.Canceled
	}
	defer func() { <-s.pausing }()
	o := s.orders()
	if req.Undo {
		if o.MemoryBefore != 0 {
			if err := setTarget(m, o.MemoryBefore); err != nil {
				return nil, err
			}
			o.MemoryBefore = 0
		}
		if req.CPU == 0 && o.CPU != UsualCPUPart {
			req.CPU = UsualCPUPart
		}
	}
	if req.Memory != 0 {
		b, err := balloonOf(m)
		if err != nil {
			return nil, err
		}
		before := b.Status().Target
		if err := setTarget(m, req.Memory); err != nil {
			return nil, err
		}
		if o.MemoryBefore == 0 {
			o.MemoryBefore = before
		}
	}
	if req.CPU != 0 {
		o.CPU = req.CPU
		o.Paused, o.Unenforced, err = s.setCPUPart(m, int(req.CPU))
	}
	if err != nil { // what was done to the memory holds all the same
		o.CPU = s.orders().CPU
	}
	s.mu.Lock()
	s.cfg.Info.Orders = &o
	s.mu.Unlock()
	return o, err
}

// orders is what holds now.
func (s *Server) orders() Orders {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cfg.Info.Orders == nil {
		return Orders{CPU: UsualCPUPart}
	}
	return *s.cfg.Info.Orders
}

// setCPUPart changes a machine while it stands still (S4.10), for orderPause at most
// until it does; one that was paused before stays so. With s.pausing.
func (s *Server) setCPUPart(m Machine, percent int) (paused int64, unenforced string, err error) {
	w, ok := m.(Weighted)
	if !ok {
		return 0, "this machine's threads are not its own process's", nil
	}
	s.mu.Lock()
	was := s.paused
	s.mu.Unlock()
	begin := time.Now()
	if !was {
		ctx, cancel := context.WithTimeout(context.Background(), orderPause)
		defer cancel()
		if err := m.Pause(ctx); err != nil {
			_ = m.Resume() // it may be paused or not; an end is what Pause reported
			return 0, "", fmt.Errorf("the machine did not stand still within %v, and stays as it was: %w", orderPause, err)
		}
	}
	err = w.SetCPUPart(percent)
	if !was {
		if rerr := m.Resume(); rerr != nil && !errors.Is(rerr, vmm.ErrEnded) {
			return 0, "", rerr
		}
	}
	if err != nil {
		return time.Since(begin).Nanoseconds(), err.Error(), nil
	}
	return time.Since(begin).Nanoseconds(), "", nil
}

// Order changes the machine's allocations by a work order, and returns what holds then.
func (c *Client) Order(ctx context.Context, req OrderRequest) (o Orders, err error) {
	return o, c.Conn().Do(ctx, OpOrder, req, &o)
}
