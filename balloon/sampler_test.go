package balloon_test

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/balloon"
	"github.com/gondola-vmm/gondola/vmm/mem"
)

// touchAll reads or writes one byte of each page of a range through the mapping.
func touchAll(t testing.TB, m *mem.Memory, a mem.Addr, n uint64, write bool) {
	t.Helper()
	v, err := m.View(a, n)
	require.NoError(t, err)
	sum := byte(0)
	for i := uint64(0); i < n; i += mem.PageSize {
		if write {
			v[i]++
		} else {
			sum += v[i]
		}
	}
	sink += sum
}

var sink byte

func TestSamplerSeesWhatIsTouched(t *testing.T) {
	const size = 48 * mib
	for _, write := range []bool{true, false} {
		r := start(t, size, balloon.Config{})
		touchAll(t, r.Mem, 0, size, true)
		s := balloon.NewSampler(r.Mem, r.dev, balloon.SamplerConfig{Samples: 512, Rand: rand.New(rand.NewPCG(3, 4))})
		before, err := r.Mem.Load64(driverMemory + 4096)
		require.NoError(t, err)
		for _, want := range []float64{0, 0.25, 0.75, 1, 0} {
			require.NoError(t, s.Step())
			touchAll(t, r.Mem, 0, uint64(want*size), write)
			e, err := s.Estimate()
			require.NoError(t, err)
			// Four standard errors, and whole windows that a read brings back.
			assert.GreaterOrEqual(t, e.Fraction, want-4*0.5/math.Sqrt(512), "write %t", write)
			require.NoError(t, s.Step())
			f, err := s.Estimate()
			require.NoError(t, err)
			assert.GreaterOrEqual(t, f.Fraction, f.Slow)
			assert.GreaterOrEqual(t, f.Fraction, f.Fast)
			if want == 0 && f.Intervals == 1 {
				assert.Less(t, f.Fraction, 0.02)
			}
			if want == 0.25 {
				assert.InDelta(t, 0.125, f.Fast, 0.06, "half of the new, half of the old")
				assert.InDelta(t, 0.25/16, f.Slow, 0.02)
			}
			require.NoError(t, s.Step(), "untouched")
		}
		after, err := r.Mem.Load64(driverMemory + 4096)
		require.NoError(t, err)
		if !write {
			assert.Equal(t, before, after, "nothing is lost")
		}
	}
}

// The balloon's pages are not counted, neither as idle nor as active.
func TestSamplerLeavesTheBalloonOut(t *testing.T) {
	const size = 64 * mib
	r := start(t, size, balloon.Config{})
	for a := uint32(16 * mib / mem.PageSize); a < size/mem.PageSize; a += balloon.MaxPFNs {
		r.frames(inflateQ, sequence(a, min(balloon.MaxPFNs, size/mem.PageSize-a))...)
	}
	s := balloon.NewSampler(r.Mem, r.dev, balloon.SamplerConfig{Samples: 128})
	require.NoError(t, s.Step())
	touchAll(t, r.Mem, 0, 16*mib, true)
	e, err := s.Estimate()
	require.NoError(t, err)
	assert.InDelta(t, 1, e.Fraction, 0.001)
	assert.InDelta(t, 16*mib, e.Active, 0.02*mib)
}

func TestSamplerOfClosedMemory(t *testing.T) {
	m, err := mem.New(64*mib, mem.Options{})
	require.NoError(t, err)
	s := balloon.NewSampler(m, nil, balloon.SamplerConfig{})
	require.NoError(t, s.Step())
	require.NoError(t, m.Close())
	assert.ErrorIs(t, s.Step(), mem.ErrClosed)
	_, err = s.Estimate()
	assert.ErrorIs(t, err, mem.ErrClosed)
	assert.ErrorIs(t, s.Run(t.Context()), mem.ErrClosed)
	require.NoError(t, m.Unmap())
}

// The whole cost of one interval: choosing, forgetting, and looking.
func BenchmarkSample(b *testing.B) {
	r := start(b, 256*mib, balloon.Config{})
	touchAll(b, r.Mem, 0, 256*mib, true)
	s := balloon.NewSampler(r.Mem, r.dev, balloon.SamplerConfig{})
	for b.Loop() {
		require.NoError(b, s.Step())
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/balloon.DefaultSamples, "µs/page")
}
