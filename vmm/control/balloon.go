package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/gondola-vmm/gondola/balloon"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// Operations of a machine's memory.
const (
	OpBalloon = "machine.balloon" // BalloonRequest → Memory
)

// ErrNoBalloon: the machine was started without a balloon.
var ErrNoBalloon = errors.New("the machine has no balloon")

// MemoryMachine is a Machine whose memory can be watched and revoked.
type MemoryMachine interface {
	Balloon() *balloon.Device // nil: none
	Usage() (mem.Usage, error)
	SampleMemory(balloon.SamplerConfig)
	ActiveMemory() (balloon.Estimate, bool)
}

// BalloonRequest looks at a machine's memory, after changing what is not zero.
type BalloonRequest struct {
	// Target is the memory that the guest shall have, in bytes.
	Target uint64 `cbor:"1,keyasint,omitempty"`
	// StatsMS asks the guest for fresh statistics and waits at most so many
	// milliseconds; those before it are answered when it does not tell.
	StatsMS int64 `cbor:"2,keyasint,omitempty"`
	// SampleMS begins to estimate the active memory at this interval in
	// milliseconds, unless it is on already with the same settings.
	SampleMS int64 `cbor:"3,keyasint,omitempty"`
	Samples  int   `cbor:"4,keyasint,omitempty"`
	// Audit looks for pages of the balloon that have host memory all the
	// same, and gives them back again.
	Audit bool `cbor:"5,keyasint,omitempty"`
	// PSS asks for PSS and Swap, which takes the kernel some milliseconds a
	// GiB to count.
	PSS bool `cbor:"6,keyasint,omitempty"`
}

// maxStatsWait bounds BalloonRequest.StatsMS.
const maxStatsWait = 10 * time.Second

// Memory is the account of a machine's memory, in bytes.
type Memory struct {
	Size      uint64 `cbor:"1,keyasint" json:"size_bytes"`      // configured
	Target    uint64 `cbor:"2,keyasint" json:"target_bytes"`    // what the guest shall have
	Actual    uint64 `cbor:"3,keyasint" json:"actual_bytes"`    // what it has: all but the balloon, as the host counts
	Minimum   uint64 `cbor:"4,keyasint" json:"minimum_bytes"`   // the lowest target
	Claimed   uint64 `cbor:"5,keyasint" json:"claimed_bytes"`   // the balloon by the guest's word
	Allocated uint64 `cbor:"6,keyasint" json:"allocated_bytes"` // host memory behind it, RAM or swap
	PSS       uint64 `cbor:"7,keyasint" json:"pss_bytes"`
	Swap      uint64 `cbor:"8,keyasint,omitempty" json:"swap_bytes"`
	Reported  uint64 `cbor:"9,keyasint,omitempty" json:"reported_bytes"` // by free page reporting, in total
	Refused   uint64 `cbor:"10,keyasint,omitempty" json:"refused_pages"` // page frames that were nonsense
	Failed    uint64 `cbor:"11,keyasint,omitempty" json:"failed_pages"`  // pages that the host did not take back
	Cheated   uint64 `cbor:"12,keyasint,omitempty" json:"cheated_bytes"` // found by an audit: in the balloon, but in use
	Balloon   bool   `cbor:"13,keyasint,omitempty" json:"balloon"`       // there is one
	Driver    bool   `cbor:"14,keyasint,omitempty" json:"driver"`        // and the guest drives it
	Reached   bool   `cbor:"15,keyasint,omitempty" json:"reached"`       // Actual is Target
	Late      bool   `cbor:"16,keyasint,omitempty" json:"late"`          // no progress within the deadline
	WaitingMS int64  `cbor:"17,keyasint,omitempty" json:"waiting_ms"`    // since the last progress
	Problem   string `cbor:"18,keyasint,omitempty" json:"problem,omitempty"`
	// Active is the estimate of the memory that the guest uses, and Fraction
	// its part of Actual; Intervals of 0 means that none is known.
	Active    uint64            `cbor:"19,keyasint,omitempty" json:"active_bytes"`
	Fraction  float64           `cbor:"20,keyasint,omitempty" json:"active_fraction"`
	Intervals uint64            `cbor:"21,keyasint,omitempty" json:"active_intervals"`
	SampleNS  int64             `cbor:"22,keyasint,omitempty" json:"active_cost_ns"`
	Stats     map[string]uint64 `cbor:"23,keyasint,omitempty" json:"stats,omitempty"` // the guest's own, by name
	StatsAgo  int64             `cbor:"24,keyasint,omitempty" json:"stats_age_ms,omitempty"`
	Features  []string          `cbor:"25,keyasint,omitempty" json:"features,omitempty"`
	Paused    bool              `cbor:"26,keyasint,omitempty" json:"paused,omitempty"`
	Policy    Policy            `cbor:"27,keyasint,omitempty" json:"policy"`
}

// memory is the account of a machine; nil if it cannot tell.
func memory(m Machine, pss bool) *Memory {
	w, ok := m.(MemoryMachine)
	if !ok {
		return nil
	}
	r := &Memory{}
	if pss {
		if u, err := w.Usage(); err == nil {
			r.PSS, r.Swap = u.PSS, u.Swap
		}
	}
	if e, ok := w.ActiveMemory(); ok {
		r.Active, r.Fraction, r.Intervals, r.SampleNS = e.Active, e.Fraction, e.Intervals, int64(e.Cost)
	}
	b := w.Balloon()
	if b == nil {
		return r
	}
	s := b.Status()
	r.Balloon = true
	r.Size, r.Target, r.Actual, r.Minimum, r.Claimed = s.Memory, s.Target, s.Actual, s.Minimum, s.Claimed
	r.Allocated, r.Reported, r.Refused, r.Failed = s.Allocated, s.Reported, s.Refused, s.Failed
	r.Driver, r.Reached, r.Late, r.WaitingMS, r.Features = s.Driver, s.Reached, s.Late, s.Waiting.Milliseconds(), s.Features
	if err := s.Err(); err != nil {
		r.Problem = err.Error()
	}
	if s.Stats != nil {
		r.Stats, r.StatsAgo = s.Stats.Map(), time.Since(s.Stats.At).Milliseconds()
	}
	return r
}

// balloon performs OpBalloon.
func (s *Server) balloon(c *proto.Call, req *BalloonRequest) (any, error) {
	m, err := s.running(c)
	if err != nil {
		return nil, err
	}
	b, err := balloonOf(m)
	if err != nil {
		return nil, err
	}
	if req.SampleMS < 0 || req.Samples < 0 || req.Samples > balloon.MaxSamples || req.SampleMS > time.Hour.Milliseconds() {
		return nil, badRequest(fmt.Errorf("sampling %d pages every %d ms: want at most %d pages, and an hour", req.Samples, req.SampleMS, balloon.MaxSamples))
	}
	if req.Target != 0 {
		if err := setTarget(m, req.Target); err != nil {
			return nil, err
		}
	}
	if req.SampleMS != 0 || req.Samples != 0 {
		want := sampling{req.SampleMS, req.Samples}
		s.mu.Lock()
		begin := s.sampling != want
		s.sampling = want
		s.mu.Unlock()
		if begin {
			m.(MemoryMachine).SampleMemory(balloon.SamplerConfig{Interval: time.Duration(req.SampleMS) * time.Millisecond, Samples: req.Samples})
		}
	}
	if req.StatsMS > 0 {
		wait := maxStatsWait
		if req.StatsMS < maxStatsWait.Milliseconds() {
			wait = time.Duration(req.StatsMS) * time.Millisecond
		}
		ctx, cancel := callContext(c)
		ctx, cancelWait := context.WithTimeout(ctx, wait)
		_, _ = b.Stats(ctx) // what was known before stands
		cancelWait()
		cancel()
	}
	cheated := uint64(0)
	if req.Audit {
		if cheated, err = b.Audit(true); err != nil {
			return nil, err
		}
	}
	r := memory(m, req.PSS)
	r.Cheated = cheated
	s.mu.Lock()
	r.Paused, r.Policy = s.paused, s.cfg.Info.Policy
	s.mu.Unlock()
	return r, nil
}

// balloonOf is a machine's balloon.
func balloonOf(m Machine) (*balloon.Device, error) {
	if w, ok := m.(MemoryMachine); ok && w.Balloon() != nil {
		return w.Balloon(), nil
	}
	return nil, ErrNoBalloon
}

// setTarget sets the memory that the guest shall have, in bytes.
func setTarget(m Machine, n uint64) error {
	b, err := balloonOf(m)
	if err != nil {
		return err
	}
	if err := b.SetTarget(n); err != nil {
		return badRequest(err)
	}
	return nil
}

// sampling is what SampleMemory was last called with.
type sampling struct {
	ms      int64
	samples int
}

func badRequest(err error) error {
	return &proto.RemoteError{Code: proto.CodeBadRequest, Message: err.Error()}
}

// Memory looks at the machine's memory, after changing what req asks for.
func (c *Client) Memory(ctx context.Context, req BalloonRequest) (m Memory, err error) {
	return m, c.Conn().Do(ctx, OpBalloon, req, &m)
}
