// Package policy divides the memory of a host among its machines (spec S3.5, S3.7,
// S3.8, S3.10): shares, minimum and maximum of each, min-funding revocation with a
// tax on idle memory, thresholds with hysteresis, admission.
//
// It is pure: what it knows it is given, what it wants done it returns, and time is
// an argument. Sizes are in bytes.
//
// # Price
//
// A machine with S shares and P bytes, of which the fraction f is active, pays
//
//	ρ = S / (P·(f + k·(1−f))),  k = 1/(1−τ)
//
// for each of its bytes: an idle byte costs k times as much as an active one, τ
// being the tax. Memory is revoked from the machine that pays least and given to
// the one that pays most (min-funding revocation; C. A. Waldspurger, "Memory
// Resource Management in VMware ESX Server", OSDI 2002, sections 5.1 and 5.2).
// Done to the end, all machines between their bounds pay the same price; Divide
// computes that state at once.
//
// Nothing that a guest says enters a decision: P is counted and f is sampled by the
// host.
package policy

import (
	"cmp"
	"math"
	"slices"
)

// Bounds of the numbers.
const (
	MaxShares  = 1 << 20
	DefaultTax = 0.75
	MaxTax     = 0.99
	page       = 4096
)

// Claim is a machine's claim on memory.
type Claim struct {
	Shares   uint64  // 1 to MaxShares
	Min, Max uint64  // bytes, Min ≤ Max
	Active   float64 // bytes of its memory that it uses
}

// Price is what a machine with size bytes pays for each of them.
func Price(c Claim, size uint64, tax float64) float64 {
	if size == 0 {
		return math.Inf(1)
	}
	active := min(c.Active, float64(size))
	return float64(c.Shares) / (active + (float64(size)-active)*idleCost(tax))
}

// idleCost is k.
func idleCost(tax float64) float64 { return 1 / (1 - min(max(tax, 0), MaxTax)) }

// Divide divides total bytes so that all machines pay the same price, as far as
// their bounds allow. The sum of the result is total, rounded down to whole pages,
// or the sum of all Min if that is more, or of all Max if that is less.
func Divide(total uint64, claims []Claim, tax float64) []uint64 {
	return divide(total, claims, tax, page)
}

// divide is Divide in units of any size.
func divide(total uint64, claims []Claim, tax float64, unit uint64) []uint64 {
	sizes := make([]uint64, len(claims))
	sane := make([]Claim, len(claims))
	lowest, highest := uint64(0), uint64(0)
	hi := 0.
	k := idleCost(tax)
	for i, c := range claims {
		c = c.in(unit)
		sane[i] = c
		lowest, highest = add(lowest, c.Min), add(highest, c.Max)
		hi = max(hi, k*float64(c.Max)/float64(c.Shares))
	}
	total = min(max(total/unit*unit, lowest), highest)
	// fill sets the sizes at which everyone pays 1/x and returns their sum.
	fill := func(x float64) (sum uint64) {
		for i, c := range sane {
			paid, active := float64(c.Shares)*x, c.Active
			if paid > active {
				paid = active + (paid-active)/k
			}
			sizes[i] = c.Max
			if paid < float64(c.Max) {
				sizes[i] = max(uint64(paid)/unit*unit, c.Min)
			}
			sum += sizes[i]
		}
		return sum
	}
	lo := 0.
	for range 200 {
		mid := lo + (hi-lo)/2
		if mid == lo || mid == hi {
			break
		}
		if fill(mid) <= total {
			lo = mid
		} else {
			hi = mid
		}
	}
	left := total - min(fill(lo), total)
	// What rounding has left goes to those that would pay most for it.
	for left >= unit {
		var most []int
		for i, c := range sane {
			if sizes[i]+unit <= c.Max {
				most = append(most, i)
			}
		}
		if len(most) == 0 {
			break
		}
		if left < uint64(len(most))*unit {
			price := func(i int) float64 { return Price(sane[i], sizes[i]+unit, tax) }
			slices.SortStableFunc(most, func(a, b int) int { return cmp.Compare(price(b), price(a)) })
			most = most[:left/unit]
		}
		for _, i := range most {
			sizes[i] += unit
			left -= unit
		}
	}
	return sizes
}

// sane is the claim within the bounds of its numbers, in whole pages.
func (c Claim) sane() Claim { return c.in(page) }

// in is the claim within the bounds of its numbers, in whole units.
func (c Claim) in(unit uint64) Claim {
	c.Shares = min(max(c.Shares, 1), MaxShares)
	c.Min = (min(c.Min, 1<<50) + unit - 1) / unit * unit
	c.Max = max(min(c.Max, 1<<50)/unit*unit, c.Min)
	c.Active = min(max(c.Active, 0), float64(c.Max))
	return c
}
