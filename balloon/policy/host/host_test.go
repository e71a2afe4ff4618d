package host

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestRead(t *testing.T) {
	m, err := Read()
	require.NoError(t, err)
	assert.NotZero(t, m.Total)
	assert.LessOrEqual(t, m.Available, m.Total)
}

func TestParse(t *testing.T) {
	m, err := parseMeminfo(strings.NewReader("MemTotal:       2048 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\nHugePages_Total:  7\nSwapTotal: 8 kB\nSwapFree: 4 kB\n"))
	require.NoError(t, err)
	assert.Equal(t, Memory{Total: 2 << 20, Available: 1 << 20, SwapTotal: 8192, SwapFree: 4096}, m)
	for _, bad := range []string{"", "MemTotal: 12 kB\n", "MemTotal: x kB\nMemAvailable: 1 kB\n", "MemTotal: 99999999999999999999 kB\n", "MemTotal: 18446744073709551615 kB\n"} {
		_, err := parseMeminfo(strings.NewReader(bad))
		assert.ErrorIs(t, err, ErrMeminfo, "%q", bad)
	}
	some, full, ok := parsePressure("some avg10=12.50 avg60=0.00 avg300=0.00 total=1\nfull avg10=3.00 avg60=0.00 avg300=0.00 total=1\n")
	assert.True(t, ok)
	assert.InDelta(t, 0.125, some, 1e-9)
	assert.InDelta(t, 0.03, full, 1e-9)
	_, _, ok = parsePressure("some avg10=NaN\nfull avg10=1e9\nsome\n")
	assert.False(t, ok)
}

func FuzzParse(f *testing.F) {
	f.Add("MemTotal: 1 kB\nMemAvailable: 1 kB\n")
	f.Add("some avg10=1.00 avg60=0.00 avg300=0.00 total=0\n")
	f.Fuzz(func(t *testing.T, s string) {
		if m, err := parseMeminfo(strings.NewReader(s)); err == nil && m.Total == 0 {
			t.Fatal("no error and no memory")
		}
		some, full, _ := parsePressure(s)
		if some < 0 || some > 1 || full < 0 || full > 1 {
			t.Fatal(some, full)
		}
	})
}
