package initconf

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestFileRoundTrip(t *testing.T) {
	c := Config{Hostname: "h", Port: "p", Command: []string{"a", "b c"}, ExitPort: 0xf4, TimerSlack: time.Millisecond}
	b, err := c.Marshal()
	require.NoError(t, err)
	back, err := Unmarshal(b)
	require.NoError(t, err)
	assert.Equal(t, c, back)
	_, err = Unmarshal([]byte("garbage"))
	assert.ErrorContains(t, err, Path)
}

func TestApply(t *testing.T) {
	c := Config{Hostname: "file", Applets: "/bin/busybox"}
	unknown := c.Apply("console=ttyS0 gondola.hostname=line quiet gondola.port=gondola.agent gondola.exitport=0xf4 " +
		"gondola.timerslack=10ms gondola.console=ttyS1 gondola.poweroff=halt gondola.new=1 gondola.exitport=70000 " +
		"gondola.timerslack=1h gondola.poweroff=explode gondola.hostname\n")
	assert.Equal(t, Config{
		Hostname: "", Applets: "/bin/busybox", Port: "gondola.agent", ExitPort: 0xf4,
		TimerSlack: 10 * time.Millisecond, Console: "ttyS1", PowerOff: "halt",
	}, c)
	assert.Equal(t, []string{"gondola.new=1", "gondola.exitport=70000", "gondola.timerslack=1h", "gondola.poweroff=explode", "gondola.hostname"}, unknown)
}
