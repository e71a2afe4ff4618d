// Package table decides, for every name that a program in an environment asks
// for, whether the base or the environment answers (spec S1.2, S1.3, S1.9). It
// is pure: it makes no system calls and knows no files.
package table

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// Type is the kind of an object.
type Type uint8

// The object types of spec S1.5. File stands for everything that has a path;
// Socket, FIFO and Device are told apart where the request says so.
const (
	File Type = iota
	Dir
	Socket
	FIFO
	Device
	Abstract // a UNIX socket of the abstract name space
	Queue    // a POSIX message queue
	Shm      // a System V key of shared memory
	Sem      // a System V key of a semaphore set
	Msg      // a System V key of a message queue
	Hostname
	numTypes
)

var typeNames = [numTypes]string{"file", "dir", "socket", "fifo", "device", "abstract", "mq", "sysv-shm", "sysv-sem", "sysv-msg", "hostname"}

func (t Type) String() string {
	if t < numTypes {
		return typeNames[t]
	}
	return fmt.Sprintf("type %d", uint8(t))
}

// Path says whether objects of this type are named by paths.
func (t Type) Path() bool { return t <= Device }

// ParseType is the reverse of Type.String.
func ParseType(s string) (Type, error) {
	for i, n := range typeNames {
		if n == s {
			return Type(i), nil
		}
	}
	return 0, fmt.Errorf("%w: unknown object type %q; known are %s", ErrSyntax, s, strings.Join(typeNames[:], ", "))
}

// Action is what a request wants to do with an object.
type Action uint8

// The actions of spec S1. Search is walking through a directory or looking an
// object's properties up.
const (
	Search Action = iota
	Read
	Write
	Create
	Delete
	Enumerate
	Execute
	Connect
	numActions
)

var actionNames = [numActions]string{"search", "read", "write", "create", "delete", "list", "execute", "connect"}

func (a Action) String() string {
	if a < numActions {
		return actionNames[a]
	}
	return fmt.Sprintf("action %d", uint8(a))
}

// Changes says whether the action changes the object or its directory.
func (a Action) Changes() bool { return a == Write || a == Create || a == Delete }

// ParseAction is the reverse of Action.String.
func ParseAction(s string) (Action, error) {
	for i, n := range actionNames {
		if n == s {
			return Action(i), nil
		}
	}
	return 0, fmt.Errorf("%w: unknown action %q; known are %s", ErrSyntax, s, strings.Join(actionNames[:], ", "))
}

// Errors, for errors.Is.
var (
	// ErrSyntax: a name, pattern, rule or table that cannot be understood.
	ErrSyntax = errors.New("bad table")
	// ErrLoop: rules that redirect in a circle.
	ErrLoop = errors.New("redirection loop")
)

// Limits of names, in bytes (Linux PATH_MAX and NAME_MAX).
const (
	MaxName      = 4095
	MaxComponent = 255
)

// Canonical brings a name into the form that tables hold. A path starts with /
// and has no empty, "." or ".." component left (".." is resolved by text and
// stops at /, as the kernel does it at the root). Any other name is TYPE:NAME,
// where TYPE: alone stands for all names of the type. Names with NUL, invalid
// UTF-8 or over MaxName are refused with ErrSyntax.
func Canonical(name string) (string, error) {
	switch {
	case name == "":
		return "", fmt.Errorf("%w: empty name", ErrSyntax)
	case len(name) > MaxName:
		return "", fmt.Errorf("%w: a name of %d bytes; %d are allowed", ErrSyntax, len(name), MaxName)
	case strings.IndexByte(name, 0) >= 0:
		return "", fmt.Errorf("%w: name %q contains NUL", ErrSyntax, name)
	case !utf8.ValidString(name):
		return "", fmt.Errorf("%w: name %q is not UTF-8", ErrSyntax, name)
	}
	if name[0] == '/' {
		p := CleanPath(name)
		for c := range strings.SplitSeq(p, "/") {
			if len(c) > MaxComponent {
				return "", fmt.Errorf("%w: a component of %d bytes in %.40q…; %d are allowed", ErrSyntax, len(c), name, MaxComponent)
			}
		}
		return p, nil
	}
	prefix, _, ok := strings.Cut(name, ":")
	if !ok {
		return "", fmt.Errorf("%w: name %q is neither a path (/…) nor TYPE:NAME", ErrSyntax, name)
	}
	t, err := ParseType(prefix)
	if err != nil {
		return "", err
	}
	if t.Path() {
		return "", fmt.Errorf("%w: name %q: a %s is named by its path", ErrSyntax, name, t)
	}
	return name, nil
}

// CleanPath resolves ".", ".." and repeated slashes of an absolute path by text.
// It takes any bytes.
func CleanPath(p string) string {
	clean := true
	for i := 0; i < len(p); i++ {
		if p[i] == '/' && (i+1 == len(p) || p[i+1] == '/' || p[i+1] == '.') {
			clean = false
			break
		}
	}
	if clean {
		return p
	}
	out := make([]byte, 0, len(p))
	for c := range strings.SplitSeq(p, "/") {
		switch c {
		case "", ".":
		case "..":
			i := len(out) - 1
			for i > 0 && out[i] != '/' {
				i--
			}
			out = out[:max(i, 0)]
		default:
			out = append(append(out, '/'), c...)
		}
	}
	if len(out) == 0 {
		return "/"
	}
	return string(out)
}

// Name makes the name of an object that has no path.
func Name(t Type, name string) string { return t.String() + ":" + name }

// Split takes a name apart: the type (File for paths) and what follows the
// prefix.
func Split(name string) (Type, string) {
	if name == "" || name[0] == '/' {
		return File, name
	}
	prefix, rest, _ := strings.Cut(name, ":")
	t, err := ParseType(prefix)
	if err != nil {
		return File, name
	}
	return t, rest
}

// key is a name as the trees hold it: every component ends in a slash, so that a
// prefix of a key that is a key is an ancestor.
func key(name string) []byte {
	b := make([]byte, 0, len(name)+2)
	return appendKey(b, name)
}

func appendKey(b []byte, name string) []byte {
	if name == "/" {
		return append(b, '/')
	}
	if name[0] != '/' {
		p, rest, _ := strings.Cut(name, ":")
		b = append(append(b, p...), ":/"...)
		if rest == "" {
			return b
		}
		b = append(b, rest...)
		return append(b, '/')
	}
	return append(append(b, name...), '/')
}

// depth counts the components of a key.
func depth(key []byte) int {
	n := -1
	for _, c := range key {
		if c == '/' {
			n++
		}
	}
	return n
}

// unkey is the reverse of key.
func unkey(k []byte) string {
	s := string(k)
	if s == "/" {
		return s
	}
	s = strings.TrimSuffix(s, "/")
	if s[0] != '/' {
		p, rest, _ := strings.Cut(s, ":")
		return p + ":" + strings.TrimPrefix(rest, "/")
	}
	return s
}
