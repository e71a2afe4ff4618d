package table

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Pattern is a name with wildcards: * stands for any bytes within a component, ?
// for one, and a component ** for any number of components, none included.
// Everything else stands for itself. Names that are no paths have one component
// after their prefix for each slash, as paths do.
type Pattern struct {
	text  string
	parts []string
	lead  string // literal start, to reject most names at once
}

// ParsePattern reads a pattern.
func ParsePattern(s string) (Pattern, error) {
	if !utf8.ValidString(s) || strings.IndexByte(s, 0) >= 0 || len(s) > MaxName {
		return Pattern{}, fmt.Errorf("%w: pattern %.60q is not UTF-8, contains NUL or is too long", ErrSyntax, s)
	}
	if s == "" || s[0] != '/' && !strings.Contains(s, ":") {
		return Pattern{}, fmt.Errorf("%w: pattern %q is neither a path (/…) nor TYPE:NAME", ErrSyntax, s)
	}
	if s[0] == '/' {
		if c := CleanPath(s); c != s {
			return Pattern{}, fmt.Errorf("%w: pattern %q is not in its plain form %q", ErrSyntax, s, c)
		}
	} else if _, err := Canonical(s); err != nil {
		return Pattern{}, err
	}
	p := Pattern{text: s, parts: components(s)}
	if strings.Count(s, "**") > 4 || strings.Count(s, "*") > 16 {
		return Pattern{}, fmt.Errorf("%w: pattern %q has more than 4 ** or 16 *", ErrSyntax, s)
	}
	for _, c := range p.parts {
		if c != "**" && strings.Contains(c, "**") {
			return Pattern{}, fmt.Errorf("%w: pattern %q: ** must be a whole component", ErrSyntax, s)
		}
	}
	p.lead = s
	if i := strings.IndexAny(s, "*?"); i >= 0 {
		p.lead = s[:i]
		if s[i:] == "**" || strings.HasPrefix(s[i:], "**/") {
			p.lead = strings.TrimSuffix(p.lead, "/") // /a/** matches /a
		}
	}
	return p, nil
}

func (p Pattern) String() string { return p.text }

// components splits a name; the prefix of a name that is no path is one.
func components(s string) []string {
	if s == "/" {
		return nil
	}
	if s[0] == '/' {
		return strings.Split(s[1:], "/")
	}
	prefix, rest, _ := strings.Cut(s, ":")
	if rest == "" {
		return []string{prefix + ":"}
	}
	return append([]string{prefix + ":"}, strings.Split(rest, "/")...)
}

// Match says whether the canonical name matches. The captures are what the
// wildcards stood for, in order.
func (p Pattern) Match(name string) (captures []string, ok bool) {
	if !strings.HasPrefix(name, p.lead) {
		return nil, false
	}
	caps := make([]string, 0, 4)
	steps := 0
	return matchParts(p.parts, components(name), caps, &steps)
}

// matchSteps bounds the work of one match against patterns made to be slow.
const matchSteps = 20000

func matchParts(pat, name, caps []string, steps *int) ([]string, bool) {
	for {
		if *steps++; *steps > matchSteps {
			return nil, false
		}
		if len(pat) == 0 {
			return caps, len(name) == 0
		}
		if pat[0] == "**" {
			for n := len(name); n >= 0; n-- {
				if c, ok := matchParts(pat[1:], name[n:], append(caps, strings.Join(name[:n], "/")), steps); ok {
					return c, true
				}
			}
			return nil, false
		}
		if len(name) == 0 {
			return nil, false
		}
		c, ok := matchPart(pat[0], name[0], caps, steps)
		if !ok {
			return nil, false
		}
		caps, pat, name = c, pat[1:], name[1:]
	}
}

func matchPart(pat, s string, caps []string, steps *int) ([]string, bool) {
	for {
		if *steps++; *steps > matchSteps {
			return nil, false
		}
		if pat == "" {
			return caps, s == ""
		}
		switch pat[0] {
		case '*':
			for n := len(s); n >= 0; n-- {
				if c, ok := matchPart(pat[1:], s[n:], append(caps, s[:n]), steps); ok {
					return c, true
				}
			}
			return nil, false
		case '?':
			if s == "" {
				return nil, false
			}
			_, n := utf8.DecodeRuneInString(s)
			caps = append(caps, s[:n])
			pat, s = pat[1:], s[n:]
		default:
			if s == "" || pat[0] != s[0] {
				return nil, false
			}
			pat, s = pat[1:], s[1:]
		}
	}
}

// wildcards counts the captures of a pattern.
func (p Pattern) wildcards() int {
	n := 0
	for _, c := range p.parts {
		if c == "**" {
			n++
		} else {
			n += strings.Count(c, "*") + strings.Count(c, "?")
		}
	}
	return n
}

// Template makes a name out of a match: $1 … $9 are the captures, $0 the whole
// name, $$ a dollar sign.
type Template struct{ text string }

// ParseTemplate reads a template for names that match p.
func ParseTemplate(s string, p Pattern) (Template, error) {
	if s == "" || s[0] != '/' && !strings.Contains(s, ":") {
		return Template{}, fmt.Errorf("%w: redirection to %q, which is neither a path (/…) nor TYPE:NAME", ErrSyntax, s)
	}
	if !utf8.ValidString(s) || strings.IndexByte(s, 0) >= 0 || len(s) > MaxName {
		return Template{}, fmt.Errorf("%w: redirection to %.60q, which is not UTF-8, contains NUL or is too long", ErrSyntax, s)
	}
	for i := 0; i < len(s); i++ {
		if s[i] != '$' {
			continue
		}
		i++
		switch {
		case i < len(s) && s[i] == '$':
		case i < len(s) && s[i] >= '0' && s[i] <= '9':
			if n := int(s[i] - '0'); n > p.wildcards() {
				return Template{}, fmt.Errorf("%w: redirection to %q: $%d, but %q has %d wildcards", ErrSyntax, s, n, p, p.wildcards())
			}
		default:
			return Template{}, fmt.Errorf("%w: redirection to %q: a $ must be followed by a digit or $", ErrSyntax, s)
		}
	}
	return Template{s}, nil
}

func (t Template) String() string { return t.text }

// Expand makes the name, in its canonical form.
func (t Template) Expand(name string, captures []string) string {
	var b strings.Builder
	for i := 0; i < len(t.text); i++ {
		if t.text[i] != '$' {
			b.WriteByte(t.text[i])
			continue
		}
		i++
		switch n := int(t.text[i] - '0'); {
		case t.text[i] == '$':
			b.WriteByte('$')
		case n == 0:
			b.WriteString(name)
		default:
			b.WriteString(captures[n-1])
		}
	}
	if s := b.String(); s[0] != '/' {
		return s
	}
	return CleanPath(b.String())
}

// pattern is what all results of the template match, for finding loops: each
// capture becomes as wide a wildcard as its own.
func (t Template) pattern(from Pattern) []string {
	var wild []string
	var whole []bool // the capture is a component: not empty, not "." or ".."
	for _, c := range from.parts {
		if c == "**" {
			wild, whole = append(wild, "**"), append(whole, false)
			continue
		}
		for i := range len(c) {
			if c[i] == '*' || c[i] == '?' {
				wild, whole = append(wild, "*"), append(whole, len(c) == 1)
			}
		}
	}
	var out []string
	for _, part := range components(t.text) {
		if part == "" || part == "." {
			continue
		}
		var b strings.Builder
		wide, solid, some := false, false, false
		for i := 0; i < len(part); i++ {
			if part[i] != '$' {
				b.WriteByte(part[i])
				solid = solid || part[i] != '.'
				continue
			}
			i++
			if n := int(part[i] - '0'); part[i] == '$' {
				solid = true
			} else if n > 0 && wild[n-1] != "**" {
				some = true
				solid = solid || whole[n-1]
			}
			if part[i] == '$' {
				b.WriteByte('$')
			} else if n, _ := strconv.Atoi(part[i : i+1]); n == 0 || wild[n-1] == "**" {
				wide = true
			} else {
				b.WriteByte('*')
			}
		}
		if t.text[0] == '/' && (part == ".." || some && !solid) {
			return []string{"**"} // it may become nothing, or lead up
		}
		if wide {
			out = append(out, "**") // wider than needed where text stands beside it
		} else {
			out = append(out, b.String())
		}
	}
	return out
}

// overlap says whether two patterns have a name in common.
func overlap(a, b []string) bool {
	switch {
	case len(a) > 0 && a[0] == "**":
		return overlap(a[1:], b) || len(b) > 0 && overlap(a, b[1:])
	case len(b) > 0 && b[0] == "**":
		return overlap(b, a)
	case len(a) == 0 || len(b) == 0:
		return len(a) == len(b)
	}
	return overlapPart(a[0], b[0]) && overlap(a[1:], b[1:])
}

func overlapPart(a, b string) bool {
	switch {
	case a != "" && a[0] == '*':
		return overlapPart(a[1:], b) || b != "" && overlapPart(a, b[1:])
	case b != "" && b[0] == '*':
		return overlapPart(b, a)
	case a == "" || b == "":
		return a == b
	}
	return (a[0] == b[0] || a[0] == '?' || b[0] == '?') && overlapPart(a[1:], b[1:])
}
