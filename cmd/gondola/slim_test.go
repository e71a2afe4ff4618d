package main

import (
	"bufio"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestCleanMappings(t *testing.T) {
	const smaps = `00400000-00800000 r-xp 00000000 fe:00 7 /usr/bin/gondola
Size:               4096 kB
Anonymous:             0 kB
00800000-00900000 r--p 00400000 fe:00 7 /usr/bin/gondola
Anonymous:             4 kB
00900000-00a00000 r--p 00500000 fe:00 7 /usr/bin/gondola
Anonymous:             0 kB
00a00000-00b00000 rw-p 00600000 fe:00 7 /usr/bin/gondola
Anonymous:             0 kB
00b00000-00c00000 r-xp 00000000 fe:00 8 /usr/bin/other/usr/bin/gondola
Anonymous:             0 kB
7f0000000000-7f0000001000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
`
	got := cleanMappings(bufio.NewScanner(strings.NewReader(smaps)), "/usr/bin/gondola")
	assert.Equal(t, []mapping{{0x400000, 0x400000}, {0x900000, 0x100000}}, got)
}
