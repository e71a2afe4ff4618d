//go:build !lean

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/gondola-vmm/gondola/balloon/policy"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// errConfig: a configuration of the manager is not understood. The error names the
// line.
var errConfig = errors.New("configuration")

// managerConfig is the file of gondola manager --config (docs/balloon.md).
type managerConfig struct {
	set        map[string]bool // what the file says
	tax        float64
	interval   time.Duration
	sample     time.Duration
	samples    int
	budget     memorySize
	processors int
	bandwidth  bandwidths
	thresholds [3]float64
	machines   []machineRule
}

// machineRule is what holds for machines whose names match. What is nil is as the
// machine was started.
type machineRule struct {
	pattern          string
	shares, min, max *uint64
}

// maxManagerConfig is the largest file, in bytes.
const maxManagerConfig = 1 << 20

// readManagerConfig reads a file.
func readManagerConfig(name string) (*managerConfig, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxManagerConfig+1))
	if err != nil {
		return nil, err
	}
	c, err := parseManagerConfig(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return c, nil
}

// at is an error at a node.
func configError(n *yaml.Node, format string, a ...any) error {
	return fmt.Errorf("%w: line %d: %s", errConfig, n.Line, fmt.Sprintf(format, a...))
}

// parseManagerConfig reads a configuration from its text.
func parseManagerConfig(b []byte) (*managerConfig, error) {
	if len(b) > maxManagerConfig {
		return nil, fmt.Errorf("%w: more than %d bytes", errConfig, maxManagerConfig)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return nil, fmt.Errorf("%w: %s", errConfig, strings.TrimPrefix(err.Error(), "yaml: "))
	}
	c := &managerConfig{set: map[string]bool{}}
	if doc.Kind == 0 {
		return nil, fmt.Errorf("%w: empty; it needs at least \"version: 1\"", errConfig)
	}
	err := configFields(doc.Content[0], "the configuration", map[string]func(*yaml.Node) error{
		"version": func(n *yaml.Node) error {
			if n.Value != "1" {
				return configError(n, "version %q; this program knows version 1", n.Value)
			}
			return nil
		},
		"tax": func(n *yaml.Node) (err error) {
			if c.tax, err = configFraction(n); err == nil && c.tax > policy.MaxTax {
				err = configError(n, "tax %s: want 0 to %v", n.Value, policy.MaxTax)
			}
			return err
		},
		"interval":        configDuration(&c.interval, minManagerInterval, maxManagerInterval),
		"sample-interval": configDuration(&c.sample, minSampleInterval, maxSampleInterval),
		"samples": func(n *yaml.Node) (err error) {
			if c.samples, err = strconv.Atoi(n.Value); err != nil || c.samples < 1 || c.samples > maxManagerSamples {
				return configError(n, "samples %q: want 1 to %d", n.Value, maxManagerSamples)
			}
			return nil
		},
		"budget": func(n *yaml.Node) error {
			if err := c.budget.Set(n.Value); err != nil {
				return configError(n, "budget %q: %v", n.Value, err)
			}
			return nil
		},
		"processors": func(n *yaml.Node) (err error) {
			if c.processors, err = strconv.Atoi(n.Value); err != nil || c.processors < 1 || c.processors > maxProcessors {
				return configError(n, "processors %q: want 1 to %d", n.Value, maxProcessors)
			}
			return nil
		},
		"bandwidth":  c.parseBandwidth,
		"thresholds": c.parseThresholds,
		"machines":   c.parseMachines,
	}, c.set)
	if err != nil {
		return nil, err
	}
	if !c.set["version"] {
		return nil, fmt.Errorf("%w: line 1: no version; write \"version: 1\"", errConfig)
	}
	return c, nil
}

// configFields calls the function of each field of a mapping.
func configFields(n *yaml.Node, what string, known map[string]func(*yaml.Node) error, seen map[string]bool) error {
	if n.Kind != yaml.MappingNode {
		return configError(n, "%s must be a mapping of names to values", what)
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		f, ok := known[k.Value]
		if !ok {
			names := make([]string, 0, len(known))
			for name := range known {
				names = append(names, name)
			}
			slices.Sort(names)
			return configError(k, "unknown field %q of %s; known are %s", k.Value, what, strings.Join(names, ", "))
		}
		if seen[k.Value] {
			return configError(k, "%s twice", k.Value)
		}
		seen[k.Value] = true
		if v.Kind == yaml.AliasNode {
			return configError(v, "%s: aliases are not taken here; write the value", k.Value)
		}
		if err := f(v); err != nil {
			return err
		}
	}
	return nil
}

func configDuration(to *time.Duration, low, high time.Duration) func(*yaml.Node) error {
	return func(n *yaml.Node) error {
		d, err := time.ParseDuration(n.Value)
		if err != nil || d < low || d > high {
			return configError(n, "%q: want a duration of %v to %v", n.Value, low, high)
		}
		*to = d
		return nil
	}
}

// configFraction reads 0.06 or 6%.
func configFraction(n *yaml.Node) (float64, error) {
	s, percent := strings.CutSuffix(n.Value, "%")
	v, err := strconv.ParseFloat(s, 64)
	if percent {
		v /= 100
	}
	if err != nil || !(v >= 0 && v <= 1) { // NaN is neither
		return 0, configError(n, "%q: want 0 to 1, or a percentage as 6%%", n.Value)
	}
	return v, nil
}

// parseBandwidth reads patterns of devices, in the order in which they count.
func (c *managerConfig) parseBandwidth(n *yaml.Node) error {
	if n.Kind != yaml.MappingNode {
		return configError(n, "bandwidth must be a mapping of devices, or patterns as vd*, to bytes a second")
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if v.Kind != yaml.ScalarNode {
			return configError(v, "bandwidth %s: want bytes a second, as 200M", k.Value)
		}
		if err := c.bandwidth.add(k.Value, v.Value); err != nil {
			return configError(k, "bandwidth %v", err)
		}
	}
	return nil
}

func (c *managerConfig) parseThresholds(n *yaml.Node) error {
	known, seen := map[string]func(*yaml.Node) error{}, map[string]bool{}
	names := []string{"high", "soft", "hard"}
	for i, name := range names {
		known[name] = func(n *yaml.Node) (err error) {
			c.thresholds[i], err = configFraction(n)
			return err
		}
	}
	if err := configFields(n, "thresholds", known, seen); err != nil {
		return err
	}
	for _, name := range names {
		if !seen[name] {
			return configError(n, "thresholds without %s: give high, soft and hard", name)
		}
	}
	if t := c.thresholds; t[0] <= t[1] || t[1] <= t[2] || t[2] == 0 {
		return configError(n, "thresholds %v, %v, %v: each must be below the one before it, and above 0", t[0], t[1], t[2])
	}
	return nil
}

func (c *managerConfig) parseMachines(n *yaml.Node) error {
	if n.Kind != yaml.MappingNode {
		return configError(n, "machines must be a mapping of names, or patterns as web*, to what holds for them")
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		r := machineRule{pattern: k.Value}
		if _, err := path.Match(r.pattern, ""); err != nil || r.pattern == "" {
			return configError(k, "%q is no pattern of names: * and ? stand for characters, [a-z] for one of them", k.Value)
		}
		if slices.ContainsFunc(c.machines, func(o machineRule) bool { return o.pattern == r.pattern }) {
			return configError(k, "machine %s twice", k.Value)
		}
		bytes := func(to **uint64) func(*yaml.Node) error {
			return func(n *yaml.Node) error {
				var m memorySize
				if err := m.Set(n.Value); err != nil {
					return configError(n, "%q: %v", n.Value, err)
				}
				v := uint64(m)
				*to = &v
				return nil
			}
		}
		err := configFields(v, "machine "+r.pattern, map[string]func(*yaml.Node) error{
			"shares": func(n *yaml.Node) error {
				v, err := strconv.ParseUint(n.Value, 10, 64)
				if err != nil || v < 1 || v > policy.MaxShares {
					return configError(n, "shares %q: want 1 to %d", n.Value, policy.MaxShares)
				}
				r.shares = &v
				return nil
			},
			"min": bytes(&r.min),
			"max": bytes(&r.max),
		}, map[string]bool{})
		if err != nil {
			return err
		}
		if r.min != nil && r.max != nil && *r.min > *r.max {
			return configError(v, "machine %s: min is more than max", r.pattern)
		}
		c.machines = append(c.machines, r)
	}
	return nil
}

// policy is a machine's part: what it was started with, and over it the first rule
// that its name matches.
func (c *managerConfig) policy(name string, p control.Policy) control.Policy {
	if c == nil {
		return p
	}
	for _, r := range c.machines {
		if ok, _ := path.Match(r.pattern, name); !ok { // patterns have been looked at
			continue
		}
		for _, v := range []struct{ to, from *uint64 }{{&p.Shares, r.shares}, {&p.Min, r.min}, {&p.Max, r.max}} {
			if v.from != nil {
				*v.to = *v.from
			}
		}
		break
	}
	return p
}
