package initramfs

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestSlackProgram(t *testing.T) {
	sh, err := exec.LookPath("sh")
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "init")
	require.NoError(t, os.WriteFile(file, slackProgram(1234567*time.Nanosecond, sh), 0o755))
	cmd := exec.Command(file, "-c", "cat /proc/self/timerslack_ns; echo $0 $1 $X", "zero", "one")
	cmd.Env = append(os.Environ(), "X=env")
	out, err := cmd.Output()
	require.NoError(t, err)
	assert.Equal(t, "1234567\nzero one env\n", string(out))

	require.NoError(t, os.WriteFile(file, slackProgram(time.Second, "/no/such"), 0o755))
	assert.Error(t, exec.Command(file).Run())
}

func TestSlackInInitramfs(t *testing.T) {
	o := Options{Agent: []byte("agent")}
	o.Config.TimerSlack = time.Millisecond
	m, _ := read(t, write(t, o))
	assert.Equal(t, "agent", content(t, m["bin/gondola-agent"]))
	assert.Equal(t, string(slackProgram(agentSlack, "/bin/gondola-agent")), content(t, m["init"]))
}
