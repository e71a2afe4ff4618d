package revoke

import (
	"context"
	"fmt"

	"github.com/gondola-vmm/gondola/devices/ratelimit"
)

// minBandwidth is the lowest bandwidth of a device, in bytes a second: below it a
// guest that reads a page or two waits for so long that its kernel gives up.
const minBandwidth = 64 << 10

// IO is the bandwidth of a device's queues, in bytes a second. The device holds its
// guest to it, so there is nothing that the guest has to follow.
type IO struct {
	device     string // its name in the guest
	limiter    *ratelimit.Limiter
	configured uint64
}

var _ Resource = (*IO)(nil)

// NewIO takes the limits that the device has now as what the machine was started
// with.
func NewIO(device string, l *ratelimit.Limiter) *IO {
	return &IO{device: device, limiter: l, configured: l.Limits().BytesPerSecond}
}

// Of tells whether it is the bandwidth that l limits; nil is of none.
func (r *IO) Of(l *ratelimit.Limiter) bool { return r != nil && r.limiter == l }

// Set implements Resource. Other limits of the device, operations a second, stay.
func (r *IO) Set(target uint64) error {
	switch {
	case target == All:
		target = r.configured
	case target < minBandwidth || r.configured != 0 && target > r.configured:
		return fmt.Errorf("%s%s: %w: %d bytes/s; want %d to %s", PrefixIO, r.device, ErrTarget, target, minBandwidth, unlimited(r.configured))
	}
	l := r.limiter.Limits()
	l.BytesPerSecond = target
	r.limiter.Set(l)
	return nil
}

func unlimited(n uint64) string {
	if n == 0 {
		return "no limit"
	}
	return fmt.Sprint(n)
}

// Status implements Resource.
func (r *IO) Status() Status {
	now := r.limiter.Limits().BytesPerSecond
	_, passed := r.limiter.Passed()
	return Status{
		Name: PrefixIO + r.device, Unit: "bytes/s", Configured: r.configured, Minimum: minBandwidth, Target: now, Actual: now,
		Reached: true, Used: passed,
	}
}

// Wait implements Resource.
func (r *IO) Wait(context.Context) (Status, error) { return r.Status(), nil }
