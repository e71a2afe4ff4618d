package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestLabelNames(t *testing.T) {
	for _, good := range []string{"a", "_", "Z9", "a.b-c_d", strings.Repeat("x", 63)} {
		assert.True(t, isLabelName(good), good)
	}
	for _, bad := range []string{"", "9a", ".a", "-a", "a b", "ä", "a\n", strings.Repeat("x", 64)} {
		assert.False(t, isLabelName(bad), "%q", bad)
	}
}
