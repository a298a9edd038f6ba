// Package house checks the rules of the code that no compiler knows: which
// package may import which, no bare goroutine and no sleep in the library,
// files of a readable length.
package house

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
)

const (
	module   = "github.com/silo-nbd/silo-nbd"
	goNBD    = "github.com/pojntfx/go-nbd"
	maxLines = 600 // a Go file has fewer
)

// arrows says which of our packages each package imports. What lies under a
// name that ends in /... is meant with it; the first match counts.
var arrows = []struct {
	from string
	to   []string
}{
	{"pkg/storage", nil},
	{"pkg/storage/...", []string{"pkg/storage"}},
	{"pkg/protocol/wire", nil},
	{"pkg/protocol", []string{"pkg/protocol/wire", "pkg/storage"}},
	{"pkg/lazy", []string{"pkg/storage", "pkg/storage/bootfile"}},
	{"pkg/crowd", nil},
	{"pkg/migrate", []string{"pkg/crowd", "pkg/protocol", "pkg/lazy", "pkg/protocol/wire", "pkg/storage", "pkg/storage/bootfile"}},
	{"pkg/nbdexport", []string{"pkg/crowd"}},
	// The device of a migration and the places where disks lie are named in
	// the wiring; the protocol is not.
	{"cmd/...", []string{"pkg/migrate", "pkg/nbdexport", "pkg/lazy", "pkg/storage/...", "internal/..."}},
	{"internal/...", []string{"pkg/...", "internal/..."}},
	{"integration/...", []string{"pkg/...", "internal/..."}},
}

// foreign says which packages of others only some of ours may import.
var foreign = []struct {
	what string
	by   []string
}{
	{goNBD + "/...", []string{"pkg/nbdexport", "internal/...", "cmd/...", "integration/..."}},
	{"github.com/loopholelabs/...", nil}, // its licence is not ours
}

// lab is the laboratory: what tries the product out. Only tests and the laboratory
// itself may import it.
const lab = "internal/lab/..."

// pure is what pkg/protocol/wire does without: it is bytes and structs only.
var pure = []string{"context", "net", "net/...", "os", "os/...", "sync", "sync/...", "syscall", "time"}

// Check returns what is wrong with the Go files of a module, a line each that
// begins with file and line.
func Check(root fs.FS) ([]string, error) {
	var wrong []string
	err := eachGoFile(root, func(name string, source []byte) error {
		found, err := checkFile(name, source)
		wrong = append(wrong, found...)
		return err
	})
	return wrong, err
}

// eachGoFile calls do with the slash-separated path and the content of every Go file
// of a module, outside testdata and hidden directories.
func eachGoFile(root fs.FS, do func(name string, source []byte) error) error {
	return fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "testdata" || len(d.Name()) > 1 && strings.HasPrefix(d.Name(), ".")):
			return fs.SkipDir
		case d.IsDir() || path.Ext(name) != ".go":
			return nil
		}
		source, err := fs.ReadFile(root, name)
		if err != nil {
			return err
		}
		return do(name, source)
	})
}

func checkFile(name string, source []byte) ([]string, error) {
	var wrong []string
	if n := bytes.Count(source, []byte("\n")); n >= maxLines {
		wrong = append(wrong, fmt.Sprintf("%s:%d: the file has %d lines: split it, each has less than %d", name, n, n, maxLines))
	}
	if strings.HasSuffix(name, "_test.go") {
		return wrong, nil
	}
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, name, source, parser.SkipObjectResolution)
	if err != nil {
		return wrong, err
	}
	complain := func(at ast.Node, format string, args ...any) {
		wrong = append(wrong, fmt.Sprintf("%s:%d: ", name, files.Position(at.Pos()).Line)+fmt.Sprintf(format, args...))
	}
	checkImports(path.Dir(name), file, complain)
	if matches("pkg/...", name) {
		checkGoroutines(file, complain)
	}
	return wrong, nil
}

func checkImports(from string, file *ast.File, complain func(ast.Node, string, ...any)) {
	allowed, known := ours(from)
	for _, spec := range file.Imports {
		to, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			continue // the parser has accepted it
		}
		if inside, is := strings.CutPrefix(to, module+"/"); is {
			if !known {
				complain(spec, "%s is a new package: say in internal/house what it may import", from)
			} else if !slices.ContainsFunc(allowed, func(a string) bool { return matches(a, inside) }) {
				complain(spec, "%s imports %s: DESIGN has no such arrow", from, inside)
			} else if matches(lab, inside) && !matches(lab, from) {
				complain(spec, "%s imports %s: the laboratory is not part of the product", from, inside)
			}
		}
		for _, f := range foreign {
			if matches(f.what, to) && !slices.ContainsFunc(f.by, func(a string) bool { return matches(a, from) }) {
				complain(spec, "%s imports %s: it may not", from, to)
			}
		}
		if from == "pkg/protocol/wire" && slices.ContainsFunc(pure, func(p string) bool { return matches(p, to) }) {
			complain(spec, "%s imports %s: it is bytes and structs only", from, to)
		}
	}
}

func ours(from string) (allowed []string, known bool) {
	for _, a := range arrows {
		if matches(a.from, from) {
			return a.to, true
		}
	}
	return nil, false
}

// checkGoroutines finds go statements and the use of time.Sleep.
func checkGoroutines(file *ast.File, complain func(ast.Node, string, ...any)) {
	clock := ""
	for _, spec := range file.Imports {
		if spec.Path.Value == `"time"` {
			clock = "time"
			if spec.Name != nil {
				clock = spec.Name.Name
			}
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			complain(n, "bare go statement: start it through its owner, which waits for it")
		case *ast.SelectorExpr:
			if x, ok := n.X.(*ast.Ident); ok && clock != "" && x.Name == clock && n.Sel.Name == "Sleep" {
				complain(n, "time.Sleep: wait for what is meant, or for the end")
			}
		case *ast.Ident:
			if clock == "." && n.Name == "Sleep" {
				complain(n, "time.Sleep: wait for what is meant, or for the end")
			}
		}
		return true
	})
}

// matches says whether name is pattern, or lies under it if pattern ends in /...
func matches(pattern, name string) bool {
	if dir, ok := strings.CutSuffix(pattern, "/..."); ok {
		return name == dir || strings.HasPrefix(name, dir+"/")
	}
	return name == pattern
}
